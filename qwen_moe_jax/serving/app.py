"""The server as an ASGI application."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qwen_moe_jax.errors import EngineError, InputError
from qwen_moe_jax.generation.api import QwenMoe
from qwen_moe_jax.generation.engine import Engine
from qwen_moe_jax.generation.requests import Request
from qwen_moe_jax.serving.errors import ApiError
from qwen_moe_jax.serving.limits import Limits
from qwen_moe_jax.serving.metrics import Metrics
from qwen_moe_jax.serving.protocol import Asked, parse_chat, parse_completion, parse_json
from qwen_moe_jax.serving.responses import Responses, usage_of


class Server:
    """Answers requests with one engine of one model."""

    def __init__(self, model: QwenMoe, engine: Engine, name: str, limits: Limits):
        """Nothing runs yet.

        Args:
            model: whose texts are served.
            engine: of this model.
            name: that clients call it by.
            limits: of requests.
        """
        self._model, self._engine, self.name, self._limits = model, engine, name, limits
        self._metrics = Metrics(engine)
        self._open = 0  # sequences of requests that have not ended
        self._started = int(time.time())
        self._echo = asyncio.Lock()  # prompts are scored one request at a time

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/v1/chat/completions", self._answer(parse_chat), methods=["POST"]),
            Route("/v1/completions", self._answer(parse_completion), methods=["POST"]),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._models)),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
        ]
        handlers: Any = {HTTPException: _http_error, ApiError: _api_error, Exception: _failure}
        return Starlette(routes=routes, exception_handlers=handlers)

    # Routes.

    def _answer(self, parse: Callable[..., Asked]) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def route(request: HttpRequest) -> Response:
            status = 500
            try:
                self._check_key(request)
                body = parse_json(await self._body(request))
                asked = parse(body, self.name, self._model.generation_defaults)
                response = await self._respond(request, asked)
                status = response.status_code
                return response
            except ApiError as error:
                status = error.status
                raise
            finally:
                self._metrics.count(request.url.path, status)

        return route

    def _guarded(
        self, route: Callable[[HttpRequest], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def guarded(request: HttpRequest) -> Response:
            self._check_key(request)
            return await route(request)

        return guarded

    async def _models(self, request: HttpRequest) -> Response:
        context = self._model.config.max_position_embeddings
        own = {"id": self.name, "object": "model", "created": self._started, "owned_by": "qwen-moe-jax"}
        own |= {"max_model_len": context}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [own]})
        if name != self.name:
            raise ApiError(404, f"the model {name[:80]!r} is not here; this server has {self.name!r}.")
        return JSONResponse(own)

    async def _health(self, request: HttpRequest) -> Response:
        try:
            self._engine.stats()
        except EngineError as error:
            raise ApiError(503, str(error), kind="server_error") from None
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: HttpRequest) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def _check_key(self, request: HttpRequest) -> None:
        key = self._limits.api_key
        if key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(
                401,
                "the API key is missing or another one; give it as a bearer token.",
                code="invalid_api_key",
            )

    async def _body(self, request: HttpRequest) -> bytes:
        """The body, no longer than is allowed, and no slower."""
        most = self._limits.body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise _too_large(most)
        found = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for piece in request.stream():
                    found += piece
                    if len(found) > most:
                        raise _too_large(most)
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise ApiError(408, f"the body has not come within {seconds:g} seconds.") from None
        except ClientDisconnect:
            raise ApiError(400, "the client has gone.") from None
        return bytes(found)

    # Running a request.

    async def _respond(self, request: HttpRequest, asked: Asked) -> Response:
        responses = Responses(asked, self.name, self._model.tokenizer)
        with self._admitted(len(asked.prompts) * max(1, asked.count)) as ends:
            requests = await self._submit(asked)
            for one in requests:
                ends.callback(self._end, one)
            if asked.stream:
                # the response ends them, also where the client has gone before the first event
                return _EventStream(self._streamed(requests[0], asked, responses), ends.pop_all())
            try:
                async with asyncio.timeout(self._limits.seconds), _until_gone(request):
                    results = [await one.ended_result() for one in requests]
                    prompts = await self._echoed(asked) if asked.echo else []
            except TimeoutError:
                raise self._too_slow() from None
            except _GoneError:
                raise ApiError(400, "the client has gone.") from None
            return JSONResponse(responses.whole(results, prompts))

    @contextlib.contextmanager
    def _admitted(self, sequences: int) -> Iterator[contextlib.ExitStack]:
        """Counts a request's sequences until the end of what it gives."""
        room = self._limits.sequences - self._open
        if sequences > self._limits.sequences:
            raise ApiError(
                400, f"{sequences} sequences are asked for; at most {self._limits.sequences} are taken."
            )
        if sequences > room:
            raise ApiError(
                429,
                f"{self._open} sequences are running or waiting; try again in a while.",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=1,
            )
        self._open += sequences
        with contextlib.ExitStack() as ends:
            ends.callback(self._leave, sequences)
            yield ends

    def _leave(self, sequences: int) -> None:
        self._open -= sequences

    def _end(self, request: Request) -> None:
        request.cancel()
        now = time.perf_counter()
        first = None if request.first_token is None else request.first_token - request.started
        self._metrics.time(first, (request.ended or now) - request.started)

    def _too_slow(self) -> ApiError:
        return ApiError(408, f"the request took more than {self._limits.seconds:g} seconds.", kind="timeout")

    async def _submit(self, asked: Asked) -> list[Request]:
        """Hands the prompts to the engine; templates and tokenizers run in another thread."""

        def submit() -> list[Request]:
            found: list[Request] = []
            try:
                for prompt in asked.prompts:
                    found.append(self._engine.submit(prompt, one_by_one=asked.stream, **asked.options))
            except BaseException:
                for request in found:
                    request.cancel()
                raise
            return found

        try:
            return await asyncio.to_thread(submit)
        except InputError as error:
            raise ApiError(400, str(error)) from None
        except EngineError as error:
            raise ApiError(503, str(error), kind="server_error") from None

    async def _streamed(
        self, request: Request, asked: Asked, responses: Responses
    ) -> AsyncIterator[dict[str, Any]]:
        """The events of a request with one prompt."""
        stream = responses.stream(request.reply)
        try:
            for event in stream.begin():
                yield event
            async with asyncio.timeout(self._limits.seconds):
                async for piece in request:
                    for event in stream.push(piece):
                        yield event
            if asked.include_usage:
                yield responses.chunk([], usage_of([request.result().usage]))
        except TimeoutError:
            yield self._too_slow().body()
        except EngineError as error:
            yield ApiError(500, str(error), kind="server_error").body()

    async def _echoed(self, asked: Asked) -> list[dict[str, Any]]:
        """The prompts, with the log-probabilities of their tokens where they are asked for."""
        model, tokenizer = self._model, self._model.tokenizer
        assert tokenizer is not None
        rows = [tokenizer.encode(p) if isinstance(p, str) else p for p in asked.prompts]
        texts = [
            p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=False) for p in asked.prompts
        ]
        if asked.logprobs is None:
            return [{"text": text} for text in texts]

        def score() -> Sequence[Any]:
            return model.score([r[:1] for r in rows], [r[1:] for r in rows], top_logprobs=asked.logprobs or 0)

        async with self._echo:
            scored = await asyncio.to_thread(score)
        found = []
        for text, row, one in zip(texts, rows, scored, strict=True):
            best = one.top_logprobs or [{}] * (len(row) - 1)
            logprobs = [None, *one.token_logprobs]
            found.append({"text": text, "tokens": row, "logprobs": logprobs, "likeliest": [{}, *best]})
        return found


class _GoneError(Exception):
    """The client has closed the connection."""


@contextlib.asynccontextmanager
async def _until_gone(request: HttpRequest) -> AsyncIterator[None]:
    """Ends what is within when the client goes.

    Raises:
        _GoneError: then.
    """
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone:
            task.uncancel()
            raise _GoneError from None
        raise
    finally:
        watcher.cancel()


class _EventStream(StreamingResponse):
    """Events as server-sent ones, and what is to be done once they were sent or the client has gone."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], ends: contextlib.ExitStack):
        async def lines() -> AsyncIterator[str]:
            async for event in events:
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(lines(), media_type="text/event-stream", headers=headers)
        self._ends = ends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._ends:
            await super().__call__(scope, receive, send)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {most:,} bytes that are taken.")


async def _api_error(request: HttpRequest, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _http_error(request: HttpRequest, error: HTTPException) -> Response:
    text = {404: f"there is no {request.url.path[:80]} here.", 405: f"{request.method} is not taken here."}
    told = ApiError(error.status_code, text.get(error.status_code, str(error.detail)))
    return JSONResponse(told.body(), error.status_code, headers=dict(error.headers or {}))


async def _failure(request: HttpRequest, error: Exception) -> Response:
    told = ApiError(500, f"the request failed ({type(error).__name__}: {error}).", kind="server_error")
    return JSONResponse(told.body(), 500)

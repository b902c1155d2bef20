"""One request to the engine: its tokens as they come, its result, and its end before that."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

from qwen_moe_jax.errors import EngineError
from qwen_moe_jax.generation.replies import ReplyForm
from qwen_moe_jax.generation.results import GenerationOutput, Piece, Usage
from qwen_moe_jax.generation.stopping import Row


class Runner(Protocol):
    """What a request needs of its engine."""

    def wait(self, changed: threading.Condition, until: Callable[[], bool], timeout: float | None) -> bool:
        """Waits, with `changed` held, at most `timeout` seconds; returns whether `until` holds."""
        ...

    def cancel(self, request: "Request") -> None:
        """Ends it soon, in another thread."""
        ...


class Request:
    """A prompt that an engine continues. Its methods may be called in any thread.

    Iterating, also with `async for`, gives a `Piece` for each token as it is decided, from the first one on.

    Attributes:
        prompt_tokens: of the prompt.
        reply: how the reply to a chat is told apart; None for other prompts.
        started, first_token, ended: when (`time.perf_counter`); the first token of the last sequence to get
            one; None before.
    """

    def __init__(
        self,
        rows: list[Row],
        prompt_tokens: int,
        runner: Runner,
        *,
        logprobs: bool,
        likeliest: bool,
        texts: bool,
        reply: ReplyForm | None = None,
    ):
        self.reply = reply
        self.prompt_tokens = prompt_tokens
        self.started = time.perf_counter()
        self.first_token: float | None = None
        self.ended: float | None = None
        self.cached_prompt_tokens = 0
        self._drafted = self._accepted = 0
        self._rows = rows
        self._runner = runner
        self._logprobs, self._likeliest, self._texts = logprobs, likeliest, texts
        self._pieces: list[Piece] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._wake: list[Callable[[], None]] = []
        self._on_end: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """It has ended, by itself, by `cancel` or with an error."""
        return self.ended is not None

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, waiting for each.

        Raises:
            EngineError: the engine failed, or was closed.
        """
        given = 0
        while True:
            with self._changed:
                self._runner.wait(self._changed, lambda n=given: self.done or len(self._pieces) > n, None)
                pieces, done = self._pieces[given:], self.done
            given += len(pieces)
            yield from pieces
            if done and given == len(self._pieces):
                self._raise()
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces, for `async for`; other tasks run meanwhile."""
        event, given = asyncio.Event(), 0
        wake = _waker(event)
        with self._changed:
            self._wake.append(wake)
        try:
            while True:
                event.clear()
                with self._changed:
                    pieces, done = self._pieces[given:], self.done
                given += len(pieces)
                for piece in pieces:
                    yield piece
                if done and given == len(self._pieces):
                    self._raise()
                    return
                if not pieces:
                    await event.wait()
        finally:
            with self._changed:
                self._wake.remove(wake)

    def result(self, timeout: float | None = None) -> GenerationOutput:
        """Everything, once it has ended; after `cancel` what there was until then, ended by "cancelled".

        Args:
            timeout: seconds to wait at most; None for as long as it takes.

        Raises:
            EngineError: the engine failed, or was closed.
            TimeoutError: it has not ended in time; it goes on.
        """
        with self._changed:
            if not self._runner.wait(self._changed, lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} seconds; it goes on.")
        self._raise()
        assert self.ended is not None
        first = self.ended if self.first_token is None else self.first_token
        return GenerationOutput(
            sequences=[row.tokens for row in self._rows],
            texts=[row.text or "" for row in self._rows] if self._texts else None,
            messages=None
            if self.reply is None
            else [self.reply.message_of(row.text or "") for row in self._rows],
            finish_reasons=[str(row.finish_reason) for row in self._rows],
            logprobs=[row.logprobs for row in self._rows] if self._logprobs else None,
            top_logprobs=[row.likeliest for row in self._rows] if self._likeliest else None,
            usage=Usage(
                prompt_tokens=self.prompt_tokens,
                cached_prompt_tokens=self.cached_prompt_tokens,
                generated_tokens=sum(len(row.tokens) for row in self._rows),
                drafted_tokens=self._drafted,
                accepted_tokens=self._accepted,
                prefill_seconds=first - self.started,
                decode_seconds=self.ended - first,
            ),
        )

    async def ended_result(self) -> GenerationOutput:
        """As `result`; other tasks run meanwhile."""
        event = asyncio.Event()
        self.when_ended(_waker(event))
        await event.wait()
        return self.result()

    def cancel(self) -> None:
        """Ends it, and gives what it holds back; nothing happens where it has ended already."""
        if not self.done:
            self._runner.cancel(self)

    # What the engine says.

    def take(self, index: int, token: int, logprob: float, likeliest: dict[int, float] | None) -> bool:
        """A sequence's next token; returns whether the sequence has ended."""
        row = self._rows[index]
        text = row.push(token, logprob, likeliest)
        piece = Piece(
            text=text,
            token_id=token,
            logprob=logprob,
            finish_reason=row.finish_reason,
            index=index,
            top_logprobs=likeliest,
        )
        with self._changed:
            self._pieces.append(piece)
            if self.first_token is None and all(row.tokens for row in self._rows):
                self.first_token = time.perf_counter()
            if all(row.finish_reason for row in self._rows):
                self.ended = time.perf_counter()
            self._tell()
        if self.done:
            self._call_ends()
        return row.finish_reason is not None

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """Drafts of a step that were verified, and those of them that hold."""
        self._drafted += drafted
        self._accepted += accepted

    def end(self, error: BaseException | None = None) -> None:
        """It was cancelled, or the engine failed."""
        with self._changed:
            if self.done:
                return
            self._error = error
            for row in self._rows:
                row.stop("cancelled")
            self.ended = time.perf_counter()
            self._tell()
        self._call_ends()

    def when_ended(self, call: Callable[[], None]) -> None:
        """Calls back once, in the engine's thread, or at once where it has ended already."""
        with self._changed:
            if not self.done:
                self._on_end.append(call)
                return
        call()

    def _call_ends(self) -> None:
        with self._changed:
            calls, self._on_end = self._on_end, []
        for call in calls:
            call()

    def _tell(self) -> None:
        self._changed.notify_all()
        for wake in self._wake:
            wake()

    def _raise(self) -> None:
        if self._error is not None:
            raise EngineError(f"the request was not finished: {self._error}") from self._error


def _waker(event: asyncio.Event) -> Callable[[], None]:
    """Sets an event of the running loop, from any thread."""
    loop = asyncio.get_running_loop()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits any more
            loop.call_soon_threadsafe(event.set)

    return wake

"""`Engine`: many requests at once, submitted from any thread."""

import atexit
import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from qwen_moe_jax.engine.core import Core
from qwen_moe_jax.engine.jobs import Job
from qwen_moe_jax.errors import EngineError, InputError
from qwen_moe_jax.generation.asked import Asked, Model, limited, options_of_each
from qwen_moe_jax.generation.options import GenerationConfig
from qwen_moe_jax.generation.requests import Request
from qwen_moe_jax.generation.results import GenerationOutput
from qwen_moe_jax.generation.stopping import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """An engine at one moment; counts are since it was made.

    Attributes:
        running, waiting: sequences that have a slot, and that have none yet.
        prompt_tokens: of the requests submitted.
        cached_prompt_tokens: of these, found in the prefix cache.
        generated_tokens: of all requests.
        drafted_tokens, accepted_tokens: drafts of multi-token prediction that were verified, and those of
            them that hold.
        pages, free_pages: of all data ranks; free ones are those that a request may take, which includes
            the prefix cache's.
        cached_pages: pages that only the prefix cache holds.
        snapshots, cached_snapshots: places for recurrent states, and those in use by the prefix cache.
        preemptions: how often a sequence gave its pages back, to be computed again.
        compiled_programs: steps of different shapes that it has run.
    """

    running: int
    waiting: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    pages: int
    free_pages: int
    cached_pages: int
    snapshots: int
    cached_snapshots: int
    preemptions: int
    compiled_programs: int


# Engines that were not closed. A thread that the interpreter ends in the middle of a step takes the process
# with it ("exception not rethrown"), so they are closed before.
_OPEN: "weakref.WeakSet[Engine]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_OPEN):
        engine.close()


class Engine:
    """Continues many prompts at once (continuous batching: Yu et al., Orca, OSDI 2022).

    Each sequence of a request takes one of `max_rows` slots when one is free, and leaves it when it ends.
    Prompts are read in chunks between decode steps: a running row waits for one chunk at most. What earlier
    requests have left in the pages is found again (`prefix_cache`).

    A thread runs it while there is work. A model on the devices of several processes is run by whoever waits
    for a result instead: every process has to submit the same requests in the same order, and wait for them
    in the same order; what runs next depends on nothing else, so that they take the same decisions.

    Attributes:
        memory: bytes of the pools on each device, where all of them are in use.
    """

    def __init__(self, model: Model, make_core: Callable[[], Core]):
        self._model = model
        self._make_core = make_core
        self._core: Core | None = make_core()
        self.memory = self._core.sizes.bytes
        self._driven = jax.process_count() > 1
        self._lock = threading.RLock()
        # every request that has not ended, with its rows once the core knows it
        self._running: dict[Request, list[Any]] = {}
        self._commands: list[Callable[[Core], None]] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        _OPEN.add(self)

    def __enter__(self) -> "Engine":
        """For `with`, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Ends what runs, with an error, and gives the memory back. Nothing can be submitted any more."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._fail(EngineError("the engine was closed."))
        self._core = None

    def submit(
        self,
        prompt: Any,
        generation_config: GenerationConfig | None = None,
        *,
        one_by_one: bool = True,
        **options: Any,
    ) -> Request:
        """Queues one prompt; returns at once.

        Args:
            prompt: a text, chat messages, or token ids.
            generation_config: how; see `GenerationConfig`.
            one_by_one: somebody reads along. Without, tokens may come several at a time, which costs less.
            **options: its fields, which override it, and for chats those of `chat.template_options`.

        Raises:
            InputError: several prompts, or as for `QwenMoe.generate`; a prompt that with its new tokens never
                fits the engine's pages.
            EngineError: the engine was closed.
        """
        asked = self._model.asked(prompt, generation_config, options)
        if len(asked) != 1:
            raise InputError(f"submit takes one prompt, and was given {len(asked)}; use run, or submit each.")
        return self.start(asked, one_by_one=one_by_one)[0]

    def run(
        self,
        prompts: Iterable[Any],
        options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        names: Sequence[str] | None = None,
        progress: bool = False,
    ) -> Iterator[tuple[int, GenerationOutput]]:
        """Continues many prompts, giving each result as it is there.

        Args:
            prompts: each one as for `submit`.
            options: for all of them, or a mapping for each.
            names: what errors call each of them; None means by number.
            progress: shows a bar on stderr, with tokens a second.

        Yields:
            (number of the prompt, its result).

        Raises:
            InputError: as for `submit`; of all prompts before the first is run.
        """
        listed = list(prompts)
        each = options_of_each(options, len(listed))
        asked: list[Asked] = []
        for number, (prompt, given) in enumerate(zip(listed, each, strict=True)):
            name = names[number] if names else f"prompt {number}"
            try:
                found = self._model.asked(prompt, None, dict(given))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            if len(found) != 1:
                raise InputError(f"{name} holds {len(found)} prompts; expected one.")
            asked += found
        return self._results(asked, progress)

    def _results(self, asked: list[Asked], progress: bool) -> Iterator[tuple[int, GenerationOutput]]:
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        requests = self.start(asked)
        for number, request in enumerate(requests):
            request.when_ended(lambda number=number: ended.put(number))
        tokens, began = 0, time.perf_counter()
        try:
            with tqdm(total=len(requests), disable=not progress, unit="prompt") as bar:
                for _ in requests:
                    if self._driven:
                        while ended.empty():
                            self._work_once()
                    number = ended.get()
                    out = requests[number].result()
                    tokens += out.usage.generated_tokens
                    bar.update()
                    bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):.1f} tokens/s")
                    yield number, out
        finally:
            for request in requests:
                request.cancel()

    def start(self, asked: Sequence[Asked], *, one_by_one: bool = False) -> list[Request]:
        """Queues prompts that were looked at already, in order.

        Args:
            asked: of `Model.asked`.
            one_by_one: somebody reads along, so that tokens are to be handed out one by one.

        Raises:
            InputError: one of them never fits.
            EngineError: the engine was closed.
        """
        core = self._checked_core()
        asked = [limited(one, core.sizes.pages) for one in asked]
        for one in asked:
            assert one.config.max_new_tokens is not None
            core.scheduler.check_fits(len(one.ids), one.config.max_new_tokens)
        pairs = [self._request(one, one_by_one) for one in asked]

        def submit(core: Core) -> None:
            for request, job in pairs:
                if not request.done:  # it may have been cancelled already
                    self._running[request] = list(core.submit(job))

        with self._lock:
            self._checked_core()
            self._running.update((request, []) for request, _ in pairs)
            self._command(submit)
        return [request for request, _ in pairs]

    def _request(self, asked: Asked, one_by_one: bool) -> tuple[Request, Job]:
        config, tokenizer = asked.config, self._model.tokenizer
        assert config.max_new_tokens is not None
        guides = asked.guides or (None,) * config.num_return_sequences
        rows = [Row(tokenizer, asked.end_ids, config.stops, config.max_new_tokens, guide) for guide in guides]
        request = Request(
            rows,
            len(asked.ids),
            self,
            logprobs=config.return_logprobs,
            likeliest=config.top_logprobs > 0,
            texts=tokenizer is not None,
            reply=asked.reply,
        )
        job = Job(
            prompt=asked.ids,
            max_new_tokens=config.max_new_tokens,
            sampling=tuple(
                config.row_sampling(asked.seed, index, asked.end_ids) for index in range(len(rows))
            ),
            end_ids=asked.end_ids,
            one_by_one=one_by_one or bool(config.stops),
            draft_tokens=asked.draft_tokens,
            take=lambda *said: self._take(request, *said),
            guides=asked.guides,
            likeliest=config.top_logprobs,
            drafted=request.count_drafts,
            failed=lambda core, error: self._end(core, request, error),
        )
        return request, job

    def warmup(self, *, sampled: bool = True) -> int:
        """Compiles every step that the engine may ever run; returns how many.

        Args:
            sampled: also those for rows that draw their tokens or have penalties.
        """
        done = threading.Event()
        errors: list[BaseException] = []

        def warm(core: Core) -> None:
            try:
                core.warmup(sampled=sampled)
            except BaseException as error:
                errors.append(error)
                raise
            finally:
                done.set()

        self._command(warm)
        while self._driven and not done.is_set():
            self._work_once()
        while not done.wait(timeout=0.1):
            self._checked_core()
        if errors:
            raise EngineError(f"a step does not compile: {errors[0]}") from errors[0]
        return self.stats().compiled_programs

    def stats(self) -> EngineStats:
        """How it stands."""
        core = self._checked_core()
        scheduler = core.scheduler
        return EngineStats(
            running=scheduler.running,
            waiting=scheduler.waiting + len(self._commands),
            prompt_tokens=core.prompt_tokens,
            cached_prompt_tokens=core.cached_prompt_tokens,
            generated_tokens=core.generated_tokens,
            drafted_tokens=core.drafted_tokens,
            accepted_tokens=core.accepted_tokens,
            pages=core.ranks * core.sizes.pages,
            free_pages=scheduler.free_pages + scheduler.cached_pages,
            cached_pages=scheduler.cached_pages,
            snapshots=core.ranks * core.sizes.snapshots,
            cached_snapshots=scheduler.cached_snapshots,
            preemptions=scheduler.preemptions,
            compiled_programs=len(core.programs),
        )

    # What requests ask for.

    def wait(self, changed: threading.Condition, until: Callable[[], bool], timeout: float | None) -> bool:
        """See `requests.Runner`."""
        if not self._driven:
            return changed.wait_for(until, timeout)
        end = None if timeout is None else time.perf_counter() + timeout
        while not until():
            if end is not None and time.perf_counter() > end:
                return False
            changed.release()
            try:
                self._work_once()
            finally:
                changed.acquire()
        return True

    def cancel(self, request: Request) -> None:
        """See `requests.Runner`."""

        with self._lock:
            closed = self._closed
        if closed:
            request.end()
        else:
            self._command(lambda core: self._end(core, request))

    def _end(self, core: Core, request: Request, error: BaseException | None = None) -> None:
        """Ends a request before its time; others go on."""
        for row in self._running.pop(request, ()):
            core.cancel(row)
        request.end(error)

    def _take(
        self, request: Request, index: int, token: int, logprob: float, likeliest: dict[int, float] | None
    ) -> bool:
        if index == 0 and request.first_token is None and (rows := self._running.get(request)):
            request.cached_prompt_tokens = rows[0].cached
        ended = request.take(index, token, logprob, likeliest)
        if request.done:
            self._running.pop(request, None)
        return ended

    # The thread.

    def _checked_core(self) -> Core:
        if self._core is None or self._closed:
            raise EngineError("the engine was closed; make another one with model.engine().")
        return self._core

    def _command(self, command: Callable[[Core], None]) -> None:
        """Has something done between two steps."""
        with self._lock:
            self._checked_core()
            self._commands.append(command)
            if not self._driven and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="qwen-moe-jax engine", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        """Runs while there is something to do; then the thread ends, and the next command begins another."""
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Takes commands, then advances by a step; False when there is nothing to do."""
        with self._lock:
            commands, self._commands = self._commands, []
            if self._closed:
                self._thread = None
                return False
        core = self._core
        assert core is not None
        try:
            for command in commands:
                command(core)
            if core.advance():
                return True
        except BaseException as error:  # the pools are lost with the step: everybody is told
            self._fail(error)
            self._core = self._make_core()
        with self._lock:
            if self._commands:
                return True
            self._thread = None
            return False

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            running, self._running = self._running, {}
        for request in running:
            request.end(error)

"""The engine on a CPU: many requests at once, chats, long rows; beside static batches and transformers.

    python benchmarks/make_checkpoint.py mid DIR
    python benchmarks/engine.py DIR [--requests 256] [--transformers 48] [--out NAME]

One run measures, in bfloat16 unless --dtype says otherwise:
- `--requests` requests, all there at once, with prompts of 32 to 1,024 tokens (uniform) and reply lengths
  that are lognormal (median 64, sigma 1, at most 1,024), on `--slots` rows; the same in static batches in the
  order given, each computed until its longest reply ends (what `generate` was before there was an engine);
  and the first `--transformers` of them through transformers, by its continuous batching (`generate_batch`)
  where that runs this model, else by its `generate` in static batches;
- decoding with all rows busy, and reading the prompts alone, of which an ideal schedule is made;
- a chat of 20 turns of 200 tokens: time to the first token of each turn, with the prefix cache and without;
- a decode step of rows of very different lengths against rows of one length with as many keys in all;
- the host's time between two steps, compiled programs, and the pool's memory against the keys in it.

Token ids are random and no reply ends before its length. Writes NAME.md and NAME.json.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from memory import process_memory
from needs import need

CHAT_TURNS, CHAT_TOKENS = 20, 200


@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts, and how many tokens each reply has."""

    prompts: list[np.ndarray]
    lengths: list[int]

    @property
    def wanted(self) -> int:
        """Tokens of all replies."""
        return sum(self.lengths)


def make_work(requests: int, vocab: int, seed: int = 0) -> Work:
    """As the module says."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(32, 1025, requests)
    lengths = np.clip(np.exp(rng.normal(np.log(64), 1.0, requests)).astype(int), 1, 1024)
    return Work([rng.integers(3, vocab, n).astype(np.int32) for n in sizes], lengths.tolist())


def engine_seconds(model: Any, work: Work, slots: int, **options: Any) -> tuple[float, Any, Any]:
    """(seconds, stats, the engine's core) of all requests through an engine, after a run that compiles."""
    with model.engine(max_rows=slots, **options) as engine:
        engine.warmup(sampled=False)
        before = engine.stats()
        each = [{"max_new_tokens": n, "eos_token_id": []} for n in work.lengths]
        start = time.perf_counter()
        found = dict(engine.run([p.tolist() for p in work.prompts], each))
        seconds = time.perf_counter() - start
        assert [len(found[i].sequences[0]) for i in range(len(work.prompts))] == work.lengths
        return seconds, (before, engine.stats()), engine._core


class StaticBatches:
    """Rows prefilled together and decoded until the last one has ended, in batches in the order given."""

    def __init__(self, model: Any, rows: int, longest: int):
        from qwen_moe_jax.formats.cache import pages_for

        self.steps, self.rows = model._steps, rows
        self.width = pages_for(longest)
        self.layers = self.steps.forward.new_layers(rows * self.width, rows)
        self.zero = self.steps.forward.new_states(1)
        self.tables = np.arange(rows * self.width, dtype=np.int32).reshape(rows, self.width)

    def seconds(self, prompts: list[np.ndarray], lengths: list[int]) -> float:
        """Of one batch."""
        import jax

        from qwen_moe_jax.engine.plan import BORDERS
        from qwen_moe_jax.engine.rows import (
            BLOCK_STEPS,
            MOVES,
            NO_PLACE,
            Entries,
            Roster,
            StepRows,
            empty_states,
        )
        from qwen_moe_jax.engine.sampling import MOST_ENDS, RowSampling, SamplingParams
        from qwen_moe_jax.engine.shapes import chunk_spans
        from qwen_moe_jax.formats.cache import PAGE, Placement, states_of, with_states

        start, rows = time.perf_counter(), self.rows
        slots = np.arange(rows, dtype=np.int32)
        for first in range(0, rows, MOVES):
            some = np.full(MOVES, rows, np.int32)
            some[: len(slots[first : first + MOVES])] = slots[first : first + MOVES]
            states = self.steps.move(states_of(self.layers), self.zero, some, np.ones(MOVES, np.int32))
            self.layers = with_states(self.layers, states)
        done = np.zeros(rows, np.int32)
        most = max(len(p) for p in prompts) - 1
        for begin, chunk in chunk_spans(most, 512) if most else ():
            tokens, counts = np.zeros((rows, chunk), np.int32), np.zeros(rows, np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[:-1][begin : begin + chunk]
                tokens[row, : len(part)], counts[row] = part, len(part)
            placed: Any = Placement(tables=self.tables, slots=slots, length=done)
            self.layers, waited = self.steps.prefill(self.layers, tokens, None, counts, placed)
            jax.block_until_ready(waited)
            done = done + counts
        limit = np.asarray([*lengths, *[0] * (rows - len(lengths))], np.int32)
        last = np.asarray([p[-1] for p in prompts] + [0] * (rows - len(prompts)), np.int32)
        ends = np.full((rows, MOST_ENDS), -1, np.int32)
        nowhere = np.full((rows, BORDERS), NO_PLACE, np.int32)
        arrays: Any = slots, limit, ends, limit * 0, nowhere, SamplingParams.of([RowSampling()] * rows)
        roster, states = Roster(*arrays), empty_states(rows)
        begins = np.arange(rows) < len(prompts)
        emitted, room = 0, np.full(rows, PAGE * self.width, np.int32)
        while emitted < max(lengths):
            given: Any = begins, last, done, np.zeros(rows, np.int32)
            self.layers, self.zero, states, _, block = self.steps.decode(
                self.layers,
                self.zero,
                states,
                None,
                StepRows(roster, Entries(*given), self.tables, room),
                steps=BLOCK_STEPS,
            )
            begins = np.zeros(rows, bool)
            emitted += int(np.asarray(block.count).max())
        return time.perf_counter() - start


def static_seconds(model: Any, work: Work, slots: int) -> float:
    """All requests in static batches; each batch's shapes are compiled before."""
    longest = max(len(p) + n for p, n in zip(work.prompts, work.lengths, strict=True))
    static = StaticBatches(model, slots, longest)
    static.seconds([p[:513] for p in work.prompts[:slots]], [2] * slots)
    for chunk in (16, 32, 64, 128, 256, 512):  # every tail
        static.seconds([np.ones(chunk + 1, np.int32)] * slots, [1] * slots)
    total = 0.0
    for first in range(0, len(work.prompts), slots):
        total += static.seconds(work.prompts[first : first + slots], work.lengths[first : first + slots])
    return total


def busy_rate(model: Any, slots: int, context: int, steps: int = 96) -> float:
    """Tokens a second while all rows decode, from the mean length on."""
    static = StaticBatches(model, slots, context + steps + 1)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, model.config.vocab_size, context).astype(np.int32) for _ in range(slots)]
    static.seconds(prompts, [1] * slots)
    none = min(static.seconds(prompts, [1] * slots) for _ in range(2))
    return slots * steps / (min(static.seconds(prompts, [1 + steps] * slots) for _ in range(2)) - none)


def transformers_seconds(folder: Path, dtype: str, work: Work, slots: int) -> tuple[float, str]:
    """(seconds, how) of the requests through transformers."""
    import torch
    from transformers import GenerationConfig, Qwen3_5MoeForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model: Any = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    try:
        model.generate_batch(
            [work.prompts[0][:32].tolist()], generation_config=GenerationConfig(max_new_tokens=2)
        )
        how = "generate_batch"
    except Exception as error:
        how = f"generate in batches (generate_batch: {type(error).__name__}: {str(error)[:80]})"
    start = time.perf_counter()
    if how == "generate_batch":
        longest = max(work.lengths)
        model.generate_batch(
            [p.tolist() for p in work.prompts], generation_config=GenerationConfig(max_new_tokens=longest)
        )
        return time.perf_counter() - start, how
    with torch.inference_mode():
        for first in range(0, len(work.prompts), slots):
            prompts = work.prompts[first : first + slots]
            width = max(map(len, prompts))
            ids = np.zeros((len(prompts), width), np.int64)
            mask = np.zeros_like(ids)
            for row, prompt in enumerate(prompts):
                ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
            most = max(work.lengths[first : first + slots])
            model.generate(
                torch.as_tensor(ids),
                attention_mask=torch.as_tensor(mask),
                max_new_tokens=most,
                min_new_tokens=most,
                do_sample=False,
                pad_token_id=0,
            )
    return time.perf_counter() - start, how


def chat_times(model: Any, prefix_cache: bool) -> list[float]:
    """Seconds to the first token of each turn: 100 tokens of a user, 100 of a reply."""
    rng = np.random.default_rng(2)
    half = CHAT_TOKENS // 2
    with model.engine(max_rows=4, prefix_cache=prefix_cache) as engine:
        engine.warmup(sampled=False)
        history: list[int] = []
        seconds = []
        for _ in range(CHAT_TURNS):
            history += rng.integers(3, model.config.vocab_size, half).tolist()
            start = time.perf_counter()
            request = engine.submit(history, max_new_tokens=half, eos_token_id=[])
            next(iter(request))
            seconds.append(time.perf_counter() - start)
            history += request.result().sequences[0]
        return seconds


def mixed_lengths(model: Any, slots: int) -> tuple[float, float]:
    """(milliseconds of a decode step of rows from 512 to 16k tokens, of rows of the same length)."""
    lengths = np.exp(np.linspace(np.log(512), np.log(16_384), slots)).astype(int)
    return step_milliseconds(model, lengths.tolist()), step_milliseconds(model, [int(lengths.mean())] * slots)


def step_milliseconds(model: Any, lengths: list[int], steps: int = 16) -> float:
    """Of a decode step of rows whose pages hold so many tokens; their contents do not matter."""
    import jax

    from qwen_moe_jax.engine.plan import BORDERS
    from qwen_moe_jax.engine.rows import NO_PLACE, Entries, Roster, StepRows, empty_states
    from qwen_moe_jax.engine.sampling import MOST_ENDS, RowSampling, SamplingParams
    from qwen_moe_jax.formats.cache import PAGE, pages_for

    rows = len(lengths)
    pages = [pages_for(n + 8 * steps) for n in lengths]
    width = max(pages)
    tables = np.full((rows, width), sum(pages), np.int32)
    free = iter(np.random.default_rng(3).permutation(sum(pages)))
    for row, count in enumerate(pages):
        tables[row, :count] = [next(free) for _ in range(count)]
    forward = model._steps.forward
    make = jax.jit(lambda layers: jax.tree.map(lambda x: x * 0, layers))
    layers = make(forward.new_layers(sum(pages), rows))
    slots = np.arange(rows, dtype=np.int32)
    arrays: Any = (
        slots,
        np.full(rows, 10**6, np.int32),
        np.full((rows, MOST_ENDS), -1, np.int32),
        np.zeros(rows, np.int32),
        np.full((rows, BORDERS), NO_PLACE, np.int32),
        SamplingParams.of([RowSampling()] * rows),
    )
    roster, states = Roster(*arrays), empty_states(rows)
    capacity = np.asarray([PAGE * n for n in pages], np.int32)
    begins, found, zero = np.ones(rows, bool), [], forward.new_states(1)
    for _ in range(6):
        given: Any = begins, slots + 5, np.asarray(lengths, np.int32), np.zeros(rows, np.int32)
        start = time.perf_counter()
        layers, zero, states, _, block = model._steps.decode(
            layers,
            zero,
            states,
            None,
            StepRows(roster, Entries(*given), tables, capacity),
            steps=steps,
        )
        jax.block_until_ready(block)
        found.append(time.perf_counter() - start)
    return 1e3 * statistics.median(found[1:]) / steps


class TimedSteps:
    """The compiled steps, and the seconds inside their calls: on a CPU a call computes before it returns."""

    def __init__(self, steps: Any):
        self._steps, self.seconds = steps, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._steps, name)
        return functools.partial(self._timed, found) if callable(found) else found

    def _timed(self, call: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **options)
        self.seconds += time.perf_counter() - start
        return result


def host_milliseconds(model: Any, slots: int, steps: int = 200) -> float:
    """The host's own time a decode step: planning, making arrays, looking at the tokens.

    Calls of compiled steps, and waiting for them, are left out."""
    import jax

    from qwen_moe_jax.engine.jobs import Job
    from qwen_moe_jax.engine.sampling import RowSampling

    with model.engine(max_rows=slots) as engine:
        core = engine._core
        core.steps = inside = TimedSteps(core.steps)
        prompt = np.arange(3, 20, dtype=np.int32)
        for _ in range(slots):
            core.submit(
                Job(
                    prompt=prompt,
                    max_new_tokens=steps + 20,
                    sampling=(RowSampling(),),
                    end_ids=(),
                    draft_tokens=0,
                    one_by_one=True,
                    take=lambda *_: False,
                )
            )
        waited = 0.0
        collect = core._collect

        def timed() -> None:
            nonlocal waited
            start = time.perf_counter()
            jax.block_until_ready(core._pending[0][-1])
            waited += time.perf_counter() - start
            collect()

        for _ in range(20):
            core.advance()
        core._collect, inside.seconds = timed, 0.0
        start = time.perf_counter()
        for _ in range(steps):
            core.advance()
        return 1e3 * (time.perf_counter() - start - waited - inside.seconds) / steps


def main() -> None:
    """Prints and writes what the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--transformers", type=int, default=48, help="requests for transformers; 0 for none")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    need(*(("torch", "transformers") if args.transformers else ()))
    from qwen_moe_jax import QwenMoe
    from qwen_moe_jax.host import processor_says

    model = QwenMoe.from_pretrained(args.folder, dtype=args.dtype)
    work = make_work(args.requests, model.config.vocab_size)
    found: dict[str, Any] = {
        "processor": processor_says("model name") or platform.processor(),
        "kernels": model.kernels.native or "plain XLA",
        "cores": os.cpu_count(),
        "requests": args.requests,
        "slots": args.slots,
        "prompt tokens": sum(map(len, work.prompts)),
        "reply tokens": work.wanted,
    }

    def say(name: str, value: Any) -> None:
        found[name] = value
        print(f"{name}: {value}", flush=True)

    before = process_memory("VmRSS")
    seconds, (earlier, stats), core = engine_seconds(model, work, args.slots)
    say("engine tokens/s", work.wanted / seconds)
    say("engine seconds", seconds)
    say("compiled programs", stats.compiled_programs)
    say("preemptions", stats.preemptions)
    say("cached prompt tokens", stats.cached_prompt_tokens - earlier.cached_prompt_tokens)
    say("memory of the process with the pool over that before, MB", (process_memory("VmRSS") - before) / 1e6)
    say("pool of pages, MB, if all were written", core.sizes.pages * core.sizes.page_bytes / 1e6)
    static = static_seconds(model, work, args.slots)
    say("static tokens/s", work.wanted / static)
    say("engine over static", static / seconds)
    ones = Work(work.prompts, [1] * len(work.prompts))
    prefill, _, _ = engine_seconds(model, ones, args.slots)
    say("prefill seconds", prefill)
    mean = int(np.mean([len(p) for p in work.prompts]) + np.mean(work.lengths) / 2)
    rate = busy_rate(model, args.slots, mean)
    say("tokens/s with all rows busy", rate)
    say("engine's decoding over all rows busy", work.wanted / (seconds - prefill) / rate)
    for cached in (True, False):
        times = chat_times(model, cached)
        name = "with" if cached else "without"
        say(
            f"chat {name} prefix cache: first token of turns 2, 6, 10, 20, s",
            [times[i] for i in (1, 4, 9, 19)],
        )
        if cached:
            say("turn 20 over turn 2", times[19] / times[1])
    mixed, equal = mixed_lengths(model, args.slots)
    say("step of mixed lengths, ms", mixed)
    say("mixed over equal lengths", mixed / equal)
    say("host time a step, 1 row, ms", host_milliseconds(model, 1))
    say(f"host time a step, {args.slots} rows, ms", host_milliseconds(model, args.slots))
    if args.transformers:
        some = Work(work.prompts[: args.transformers], work.lengths[: args.transformers])
        ours, _, _ = engine_seconds(model, some, args.slots)
        del model, core
        theirs, how = transformers_seconds(args.folder, args.dtype, some, args.slots)
        say("transformers", how)
        say("transformers tokens/s", some.wanted / theirs)
        say("engine over transformers, the same requests", theirs / ours)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        rows = [f"| {name} | {_short(value)} |" for name, value in found.items()]
        args.out.with_suffix(".md").write_text("\n".join(["| | |", "|---|---|", *rows]) + "\n")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()

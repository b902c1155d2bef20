"""One generation from prompts to finished rows: device blocks in between, host decisions around them."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from qwen_moe_jax.generation.engine import Block, Engine, Sampler
from qwen_moe_jax.generation.options import GenerationConfig
from qwen_moe_jax.generation.results import Piece
from qwen_moe_jax.generation.sampling import SamplingParams, SamplingPlan
from qwen_moe_jax.generation.stopping import Row


class Generation:
    """Runs prompts to their ends.

    Attributes:
        rows: what each sequence has emitted; the sequences of a prompt stand next to each other.
        prefill_seconds: until every row's first token was chosen.
        prefilled_at: when that was (`time.perf_counter`).
    """

    def __init__(
        self,
        engine: Engine,
        prompts: list[np.ndarray],
        rows: list[Row],
        config: GenerationConfig,
        eos_ids: Sequence[int],
    ):
        self.rows = rows
        self.prefill_seconds = 0.0
        self.prefilled_at = time.perf_counter()
        self._engine = engine
        self._prompts = prompts
        self._config = config
        self._plan = SamplingPlan.of(config)
        self._sampler = self._make_sampler(eos_ids)

    def _make_sampler(self, eos_ids: Sequence[int]) -> Sampler:
        # Host arrays: any process gives the same ones to its devices.
        copies = self._config.num_return_sequences
        prompts = self._engine.padded(len(self._prompts))
        seeds = np.zeros(prompts, np.uint32)
        seeds[: len(self._prompts)] = self._config.seeds(len(self._prompts))
        mask = None
        if self._plan.needs_penalties:
            mask = np.zeros((prompts, self._engine.config.vocab_size), bool)
            for row, prompt in zip(mask, self._prompts, strict=False):
                row[prompt] = True
            mask = np.repeat(mask, copies, axis=0)
        arrays: dict[str, Any] = {
            "seeds": np.repeat(seeds, copies),
            "sequence_index": np.tile(np.arange(copies, dtype=np.uint32), prompts),
            # an id that no token has stands for "none", so that the shape never is [0]
            "eos_ids": np.asarray(tuple(eos_ids) or (-1,), np.int32),
            "prompt_mask": mask,
        }
        return Sampler(params=SamplingParams.of(self._config, prompts * copies), **arrays)

    def steps(self, block_steps: int) -> Iterator[tuple[int, Piece]]:
        """Generates, yielding (row, piece) for every token.

        Args:
            block_steps: most steps between two looks of the host.
        """
        started = time.perf_counter()
        cache, last_hidden = self._engine.prefill(self._prompts, self._config.max_new_tokens)
        copies = self._config.num_return_sequences
        if copies > 1:
            cache, last_hidden = self._engine.repeat(cache, last_hidden, copies)
        state, block = self._engine.first(cache, last_hidden, self._sampler, self._plan)
        block = jax.device_get(block)
        self.prefilled_at = time.perf_counter()
        self.prefill_seconds = self.prefilled_at - started
        yield from self._absorb(block)
        while any(row.finish_reason is None for row in self.rows):
            longest = max(len(row.tokens) for row in self.rows)
            steps = min(block_steps, self._config.max_new_tokens - longest)
            # the host knows of stop strings, which the device does not
            finished: Any = np.ones(state.finished.shape, bool)  # rows behind ours hold no prompt
            finished[: len(self.rows)] = [row.finish_reason is not None for row in self.rows]
            state = dataclasses.replace(state, finished=finished)
            state, block = self._engine.decode(state, self._sampler, self._plan, steps)
            yield from self._absorb(jax.device_get(block))

    def _absorb(self, block: Block) -> Iterator[tuple[int, Piece]]:
        for index, row in enumerate(self.rows):
            for token, logprob in zip(
                block.tokens[index, : block.count[index]].tolist(),
                block.logprobs[index].tolist(),
                strict=False,
            ):
                if row.finish_reason is not None:
                    break  # a stop string ended the row within the block
                text = row.push(token, logprob)
                yield (
                    index,
                    Piece(text=text, token_id=token, logprob=logprob, finish_reason=row.finish_reason),
                )

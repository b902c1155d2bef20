"""`QwenMoe`: a checkpoint, ready to compute logits, generate text, be looked into and score."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.engine.shapes import cache_capacity
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.experiments.lens import Lens, logit_lens
from qwen_moe_jax.experiments.runs import Run
from qwen_moe_jax.formats.cache import empty_cache
from qwen_moe_jax.generation.generator import Generator, template_of
from qwen_moe_jax.generation.loading import whole_decoder
from qwen_moe_jax.generation.options import GenerationConfig
from qwen_moe_jax.generation.scores import Score, pairs_of, rolling_windows
from qwen_moe_jax.kernels.table import PLAIN, make_kernels
from qwen_moe_jax.model.decoder import with_parameters
from qwen_moe_jax.model.mtp import MTP


class QwenMoe(Generator):
    """A Qwen3.5 MoE text model with its tokenizer.

    Attributes: as of `LoadedModel`.
    """

    def points(self) -> dict[str, str]:
        """Where values can be captured and replaced: name -> what it is, with its axes."""
        return {
            name: f"{point.what} ({', '.join(point.axes)})" for name, point in self._passes.points.items()
        }

    def run(
        self,
        prompt: Any,
        capture: str | Iterable[str] = (),
        edit: Mapping[str, Any] | None = None,
        *,
        attention_mask: Any = None,
        states_at: Sequence[int] = (-1,),
        **options: Any,
    ) -> Run:
        """Runs whole texts once, and gives the values of the points that are asked for.

        Points that are not asked for are not part of the compiled program.

        Args:
            prompt: as of `generate`.
            capture: names of `points()`, or patterns such as "layers.*.router".
            edit: name or pattern -> function that replaces the value, given it as a jax array [batch, seq,
                ...] and, if it takes two arguments, `model.taps.Tokens`; `qwen_moe_jax.experiments` has
                some. A function is traced, so an equal run should be given the same function object.
            attention_mask: as of `generate`.
            states_at: positions behind which "state" is captured; negative ones count from a row's end.
            **options: with `max_new_tokens`, fields of `GenerationConfig`: the texts are continued first,
                with the edits, and then run with their continuations, which gives each step's values. Of
                chats also what `chat.template_options` takes.

        Raises:
            InputError: as of `generate`; a name that is none; attention weights that are too many.
        """
        wanted = self._passes.chosen(capture)
        template, _ = template_of(options, self.chat_template)
        batch = self._rows(prompt, attention_mask, template)
        rows = list(batch.rows)
        if options:
            if "max_new_tokens" not in options:
                raise InputError(
                    f"run was given {', '.join(options)} without max_new_tokens; give it to continue "
                    "the texts."
                )
            out = self.generate([row.tolist() for row in rows], edit=edit, **options)
            many = len(out.sequences) // len(rows)
            rows = [
                np.asarray([*row, *out.sequences[i * many + j]], np.int32)
                for i, row in enumerate(rows)
                for j in range(many)
            ]
            lengths = [len(row) for row in batch.rows for _ in range(many)]
        else:
            lengths = [len(row) for row in rows]
        self._check_length(dataclasses.replace(batch, rows=rows), 0)
        texts = None
        if self.tokenizer is not None:
            texts = [
                [self.tokenizer.decode([token], skip_special_tokens=False) for token in row.tolist()]
                for row in rows
            ]
        return self._passes.run(rows, lengths, wanted, edit, list(states_at), texts)

    def logit_lens(self, run: Run, row: int = 0) -> Lens:
        """What each layer of a run that captured "layers.*.residual_out" would say next.

        Raises:
            InputError: they were not captured, or the model lies on a mesh.
        """
        return logit_lens(self.decoder, run, row)

    @property
    def parameters(self) -> dict[str, jax.Array]:
        """The text model's parameters, canonical name -> array, as `apply` takes them.

        Raises:
            InputError: the model lies on a mesh.
        """
        if self.layout is not None:
            raise InputError("the model lies on a mesh, whose arrays are parts; load it without mesh.")
        return {name: value for name, value in self._parameters.items() if not name.startswith(MTP)}

    def apply(self, parameters: Mapping[str, jax.Array], ids: jax.Array) -> jax.Array:
        """Logits as a pure function: it can be given to jax.jit, jax.grad and jax.vmap.

        It runs plain XLA forms only, which have gradients: experts one after the other on all tokens, and
        attention with all its scores in memory.

        Args:
            parameters: as of `parameters`, or with other values.
            ids: int32 [batch, seq].

        Returns:
            float32 [batch, seq, vocab].

        Raises:
            InputError: the model lies on a mesh.
        """
        if self.layout is not None:
            raise InputError(
                "the model lies on a mesh, where apply is not implemented; load it without mesh."
            )
        dtypes = self.decoder.dtypes
        kernels = make_kernels(self.kernels.target, PLAIN | {"attention": "whole", "experts": "dense"})
        decoder = with_parameters(whole_decoder(self.config, dtypes, kernels)[0], parameters)
        ids = jnp.asarray(ids, jnp.int32)
        batch, length = ids.shape
        cache = empty_cache(self.config, batch, cache_capacity(length), dtypes.compute, dtypes.compute)
        hidden, _ = decoder(ids, jnp.ones(ids.shape, bool), cache)
        return decoder.logits(hidden)

    def score(
        self,
        contexts: Any,
        continuations: Any,
        *,
        top_logprobs: int = 0,
        edit: Mapping[str, Any] | None = None,
    ) -> list[Score]:
        """Log-probabilities of continuations after contexts. Equal contexts are computed once.

        Args:
            contexts: texts or lists of token ids, or a single one for all continuations. Of an empty text the
                first token is scored behind the end-of-text token.
            continuations: as many; of texts, a context's trailing spaces belong to the continuation, and what
                is scored are the tokens of both together behind those of the context (as lm-eval).
            top_logprobs: how many of the likeliest tokens to name in each place, at most 20.
            edit: as of `run`.

        Raises:
            InputError: different numbers of both, an empty continuation, ids outside the vocabulary, or a
                text longer than the context that the model has.
        """
        GenerationConfig(top_logprobs=top_logprobs)  # says at once what cannot be
        pairs = pairs_of(
            contexts,
            continuations,
            tokenizer=self.tokenizer,
            prefix=self._prefix_id(),
            vocab_size=self.config.vocab_size,
            longest=self.config.max_position_embeddings,
        )
        scored = self._scorer(edit)([c for c, _ in pairs], [t for _, t in pairs], top=top_logprobs)
        return [Score.of(tokens, one) for (_, tokens), one in zip(pairs, scored, strict=True)]

    def perplexity(
        self, text: Any, *, window: int | None = None, edit: Mapping[str, Any] | None = None
    ) -> float:
        """exp of the mean negative log-likelihood of a text's tokens, each scored once.

        Windows follow each other, as in lm-eval's `loglikelihood_rolling`: the first begins behind the
        end-of-text token; the last sees as much before its tokens as fills it.

        Args:
            text: a text or token ids.
            window: tokens that a prediction sees at most; None for 2,048 or the model's context.
            edit: as of `run`.

        Raises:
            InputError: as of `score`.
        """
        rows = self._rows(text, None, {}).rows
        if len(rows) != 1:
            raise InputError(f"perplexity takes one text, and was given {len(rows)}.")
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise InputError(f"window is {window!r}; expected a positive number of tokens.")
        most = min(window or 2048, self.config.max_position_embeddings - 1)
        windows = rolling_windows(rows[0].tolist(), self._prefix_id(), most)
        scored = self._scorer(edit)([c for c, _ in windows], [t for _, t in windows])
        return float(np.exp(-sum(one.logprobs.sum(dtype=np.float64) for one in scored) / len(rows[0])))

    def _prefix_id(self) -> int | None:
        """What the first token of a text is scored behind."""
        return self._eos_ids[0] if self._eos_ids else None

"""The steps that run on the device: chunks of prompts into the pools, decoding, and moves of states.

Every step takes the pools (and is donated them) and returns the next ones. A step names the rows it is about;
all other rows' pages and slots stay as they are. Nothing here knows text, or why a row is where it is.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.engine.decoding import Pass, choose, decode, forward_pass
from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.engine.rows import Block, Layers, RowStates, States, StepRows
from qwen_moe_jax.formats.cache import HybridCache, Placement


class Steps:
    """The compiled steps of one model.

    Attributes:
        forward: the model.
    """

    def __init__(self, forward: Forward):
        self.forward = forward
        jit = partial(jax.jit, compiler_options=forward.kernels.compiler_options)
        self._prefill = jit(partial(_prefill, forward), donate_argnames="layers")
        self._decode = jit(
            partial(decode, forward),
            donate_argnames=("layers", "snapshots", "states", "seen"),
            static_argnames="only",
        )
        self._forward_pass = jit(partial(forward_pass, forward), donate_argnames="layers")
        self._choose = jit(
            partial(choose, forward), donate_argnames=("layers", "snapshots", "states", "seen")
        )
        self._move = jit(forward.move_states, donate_argnums=0)
        self._remember = jit(partial(_remember, forward), donate_argnames="seen")

    @property
    def compiled_programs(self) -> int:
        """How many there are so far."""
        functions: tuple[Any, ...] = (
            self._prefill,
            self._decode,
            self._forward_pass,
            self._choose,
            self._move,
            self._remember,
        )
        return sum(function._cache_size() for function in functions)

    def prefill(
        self,
        layers: Layers,
        tokens: np.ndarray,
        following: np.ndarray | None,
        counts: np.ndarray,
        placed: Placement,
    ) -> tuple[Layers, jax.Array]:
        """Prompt tokens into the pools.

        Args:
            layers: the pools.
            tokens: int32 [rows, chunk]: rows of each data rank, one rank behind the other.
            following: the token behind each of them, for the drafter; None without one.
            counts: int32 [rows], tokens of a row; the rest of it are pads.
            placed: where they lie.

        Returns:
            (the pools, something to wait for).
        """
        return self._prefill(
            self.forward.parameters,
            layers=layers,
            tokens=tokens,
            following=following,
            counts=counts,
            placed=placed,
        )

    def decode(
        self,
        layers: Layers,
        snapshots: States,
        states: RowStates,
        seen: jax.Array | None,
        told: StepRows,
        *,
        steps: int,
    ) -> tuple[Layers, States, RowStates, jax.Array | None, Block]:
        """Up to `steps` (at most BLOCK_STEPS) forward passes, fewer when all rows have finished; each gives
        every row one token, or some with drafts.

        Args:
            layers: the pools.
            snapshots: pools of states; a row that comes to the border of a page leaves its own at its place.
            states: of all rows.
            seen: int32 [slots, vocab], the `sampling.history` of every row that penalties count for; None if
                every row of the step takes the most likely token without penalties: then nothing else is
                compiled.
            told: what the host says of the step.
            steps: at least one.

        Returns:
            (pools, snapshots, states, seen, what was emitted).
        """
        return self._decode(
            self.forward.parameters,
            layers=layers,
            snapshots=snapshots,
            states=states,
            seen=seen,
            told=told,
            steps=np.int32(steps),
        )

    def forward_pass(self, layers: Layers, states: RowStates, told: StepRows) -> tuple[Layers, Pass]:
        """The first half of a *guided* step, in which the host says which tokens may be chosen: one forward
        pass, over drafts too where the model makes some. The host decides meanwhile.

        Args:
            layers, states, told: as of `decode`; states are not donated.

        Returns:
            (pools, what `choose` takes).
        """
        return self._forward_pass(self.forward.parameters, layers=layers, states=states, told=told)

    def choose(
        self,
        layers: Layers,
        snapshots: States,
        states: RowStates,
        seen: jax.Array,
        passed: Pass,
        allowed: np.ndarray,
        *,
        likeliest: bool,
    ) -> tuple[Layers, States, RowStates, jax.Array, Block]:
        """The second half: every row's next tokens.

        Args:
            layers, snapshots, states, seen: as of `decode`.
            passed: of `forward_pass`; no other step has run since.
            allowed: uint32 [rows, tokens of the pass, words], as of `sampling.unpack_mask`.
            likeliest: also say the likeliest tokens.

        Returns:
            as of `decode`.
        """
        return self._choose(
            self.forward.parameters,
            layers=layers,
            snapshots=snapshots,
            states=states,
            seen=seen,
            passed=passed,
            allowed=allowed,
            likeliest_asked=np.bool_(likeliest),
        )

    def move(self, to: States, given: States, places: np.ndarray, sources: np.ndarray) -> States:
        """Recurrent states from one pool to another, as of `kernels.state_moves`; `to` is donated.

        Args:
            to, given: pools of states, a layer each.
            places, sources: int32 [ranks * MOVES], a list of each data rank.
        """
        return self._move(to, given, places, sources)

    def remember(self, seen: jax.Array, slots: np.ndarray, histories: np.ndarray) -> jax.Array:
        """What penalties count, with other histories.

        Args:
            seen: as of `decode`.
            slots: int32 [ranks], one of each data rank, or their number for none.
            histories: int32 [ranks, vocab].
        """
        return self._remember(seen=seen, slots=slots, histories=histories)

    def lower_prefill(
        self, layers: Layers, tokens: Any, following: Any, counts: Any, placed: Placement
    ) -> jax.stages.Lowered:
        """The program of `prefill`, of arguments without values."""
        return self._prefill.lower(
            self.forward.parameters,
            layers=layers,
            tokens=tokens,
            following=following,
            counts=counts,
            placed=placed,
        )

    def lower_decode(
        self,
        layers: Layers,
        snapshots: States,
        states: RowStates,
        told: StepRows,
        only: str | None = None,
    ) -> jax.stages.Lowered:
        """The program of `decode` for greedy rows, of arguments without values; `only` its passes over one
        token ("decode") or those that verify drafts ("verify")."""
        return self._decode.lower(
            self.forward.parameters,
            layers=layers,
            snapshots=snapshots,
            states=states,
            seen=None,
            told=told,
            steps=jax.ShapeDtypeStruct((), jnp.int32),
            only=only,
        )


def _prefill(model: Forward, params, *, layers: Layers, tokens, following, counts, placed: Placement):
    valid = jnp.arange(tokens.shape[1], dtype=jnp.int32) < counts[:, None]
    own = len(layers) - (model.drafter is not None)
    # Without drafter the hidden states are not looked at, so that the compiler drops what only they need: the
    # last layer's experts and the final norm.
    hidden, cache = model.hidden(params, tokens, valid, HybridCache(layers[:own], placed))
    after = cache.layers
    if model.drafter is not None:
        after += model.remember(params, hidden, following, valid, HybridCache(layers[own:], placed)).layers
    return after, jnp.zeros((), jnp.int32)


def _remember(model: Forward, *, seen, slots, histories) -> jax.Array:
    def write(seen, slots, histories):
        return seen.at[slots].set(histories, mode="drop")

    return model.by_row(write, seen, slots, histories)

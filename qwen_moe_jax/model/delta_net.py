"""Gated DeltaNet, the linear-attention layer (Yang, Kautz & Hatamizadeh, arXiv:2412.06464).

Projections, a short causal convolution with carried inputs, the gated delta rule
(`delta_rule.py`), a gated norm and an output projection.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.formats.cache import DeltaNetCache, DeltaNetInputs
from qwen_moe_jax.kernels.cpu.calls import (
    native_conv,
    native_delta_chunks,
    native_delta_look,
    native_delta_step,
)
from qwen_moe_jax.kernels.delta_chunks import delta_chunks
from qwen_moe_jax.kernels.delta_step import delta_step
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.delta_rule import delta_rule_chunked, delta_rule_scan, delta_rule_step
from qwen_moe_jax.model.linear import linears
from qwen_moe_jax.model.norms import L2_EPS, gated_rms_norm, l2_normalise
from qwen_moe_jax.model.params import DtypePolicy, Weight, declare
from qwen_moe_jax.model.ranks import Ranks
from qwen_moe_jax.model.taps import NO_TAPS, Taps


def causal_conv(
    x: jax.Array, weight: jax.Array, carried: jax.Array, num_valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Depthwise causal convolution followed by SiLU, continuing from the inputs seen before.

    Args:
        x: [batch, seq, channels]; each row's first `num_valid` steps are tokens, the rest pads.
        weight: [channels, kernel], any kernel width; the last column meets the current token.
        carried: [batch, kernel - 1, channels], the inputs before x, oldest first.
        num_valid: int32 [batch].

    Returns:
        ([batch, seq, channels] in x.dtype, the last kernel - 1 *valid* inputs). A pad's output means
        nothing; a row without tokens carries its inputs on unchanged.
    """
    seq, before = x.shape[1], weight.shape[1] - 1
    wide, carried = jnp.promote_types(x.dtype, jnp.float32), carried.astype(x.dtype)
    mixed = jnp.zeros(x.shape, wide)
    first, rest = carried.astype(wide), x.astype(wide)
    for tap in range(before + 1):
        # each shifted by itself: slices of both behind one another XLA:GPU would write to memory first
        shift = before - tap
        taken = jnp.concatenate([first[:, tap:], rest[:, : max(0, seq - shift)]], axis=1)[:, :seq]
        mixed = mixed + taken * weight[:, tap].astype(wide)
    place = num_valid[:, None] + jnp.arange(before) - before  # [batch, kernel - 1], in x
    old, new = (
        jnp.take_along_axis(of, at[..., None], axis=1, mode="clip")
        for of, at in ((carried, place + before), (x, place))
    )
    carried = jnp.where(place[..., None] < 0, old, new)
    # the reference rounds to the model dtype before the activation
    return jax.nn.silu(mixed.astype(x.dtype)), carried


def conv_heads(
    x: jax.Array,
    weight: jax.Array,
    carried: jax.Array,
    counts: jax.Array,
    *,
    key_dim: int,
    heads: int,
    value_dim: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the delta rule reads of the projected tokens: `causal_conv`, and queries and keys normalised.

    Args:
        x, weight, carried: as of `causal_conv`; channels are flat queries, keys and values.
        counts: int32 [batch], a row's tokens in front of its pads.
        key_dim: of a head of queries and keys.
        heads: of values.
        value_dim: of a head of values.

    Returns:
        (query [batch, seq, key_heads, key_dim] of length key_dim**-0.5 and key of length 1, in at least
        float32; value [batch, seq, heads, value_dim]; what is carried on). A pad's key and value are zero,
        its query means nothing.
    """
    mixed, carried = causal_conv(x, weight, carried, counts)
    return *split_heads(mixed, counts, key_dim=key_dim, heads=heads, value_dim=value_dim), carried


def split_heads(
    mixed: jax.Array, counts: jax.Array, *, key_dim: int, heads: int, value_dim: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of `conv_heads`, from what `causal_conv` gives; arguments as there."""
    keys = (mixed.shape[-1] - heads * value_dim) // 2
    query, key, value = jnp.split(mixed, [keys, 2 * keys], axis=-1)
    rows = mixed.shape[:2]
    query = l2_normalise(query.reshape(*rows, -1, key_dim)) * key_dim**-0.5
    key = l2_normalise(key.reshape(*rows, -1, key_dim))
    token = (jnp.arange(rows[1]) < counts[:, None])[..., None, None]
    return (
        query,
        jnp.where(token, key, 0),
        jnp.where(token, value.reshape(*rows, heads, value_dim), 0),
    )


class DepthwiseConv(nnx.Module):
    """Holds the convolution weight in its checkpoint shape, [channels, 1, kernel]."""

    def __init__(self, channels: int, kernel: int, dtype: jnp.dtype):
        self.weight = declare((channels, 1, kernel), dtype)


class GatedDeltaNet(nnx.Module):
    """Parameters of one linear-attention layer; `in_proj_qkv` rows are flat Q | K | V.

    How many heads there are is read from the parameters: a rank may hold some of them.
    """

    def __init__(self, config: ModelConfig, dtypes: DtypePolicy, kernels: Kernels, ranks: Ranks):
        self.config = config
        self.kernels = kernels
        self.ranks = ranks
        hidden, values = config.hidden_size, config.linear_num_value_heads
        self.in_proj_qkv = Weight((config.conv_channels, hidden), dtypes.matrix)
        self.in_proj_z = Weight((config.value_dim, hidden), dtypes.matrix)
        self.in_proj_b = Weight((values, hidden), dtypes.matrix)
        self.in_proj_a = Weight((values, hidden), dtypes.matrix)
        self.conv1d = DepthwiseConv(config.conv_channels, config.linear_conv_kernel_dim, dtypes.vector)
        self.A_log = declare((values,), dtypes.vector)
        self.dt_bias = declare((values,), dtypes.vector)
        self.norm = Weight((config.linear_value_head_dim,), dtypes.vector)
        self.out_proj = Weight((hidden, config.value_dim), dtypes.matrix)

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        slots: jax.Array,
        cache: DeltaNetCache,
        taps: Taps = NO_TAPS,
    ) -> tuple[jax.Array, DeltaNetCache]:
        """Mixes tokens by the gated delta rule.

        Args:
            x: [batch, seq, hidden].
            valid: bool [batch, seq], a prefix of each row.
            slots: int32 [batch], each row's own; the number of slots stands for "none".
            cache: what came before.
            taps: points of the layer.

        Returns:
            (float32 [batch, seq, hidden], to be summed by `ranks.sum_heads`; the cache after this call's
            valid tokens, in which slots of other rows are as they were).
        """
        inputs, gate = self._project(x, valid)
        if taps.uses("beta") or taps.uses("decay"):
            beta, decay = taps("beta", inputs.beta), taps("decay", jnp.exp(inputs.g))
            g = jnp.log(decay) if taps.replaces("decay") else inputs.g
            inputs = DeltaNetInputs(mixed=inputs.mixed, g=g, beta=beta)
        counts = valid.sum(axis=1, dtype=jnp.int32)
        if self._in_one_kernel(x, cache):
            output, after = self._chunks(inputs, slots, cache, counts, taps)
            return self._leave(output, gate, x.dtype), after
        tokens, conv = self._read(inputs, slots, cache, counts)
        _keep_states(taps, tokens, slots, cache)
        output, state = _recur(self.kernels, tokens, cache.state, slots, x.dtype.name)
        return self._leave(output, gate, x.dtype), DeltaNetCache(conv=conv, state=state)

    def _in_one_kernel(self, x: jax.Array, cache: DeltaNetCache) -> bool:
        """Whether the tokens go through `delta_chunks`, which reads them as they leave the convolution."""
        chosen = self.kernels.pick("delta_chunks", x.dtype.name, x.shape[1])
        return x.shape[1] > 1 and cache.state.dtype == jnp.float32 and chosen == "pallas_chunks"

    def _chunks(
        self, inputs: DeltaNetInputs, slots: jax.Array, cache: DeltaNetCache, counts: jax.Array, taps: Taps
    ) -> tuple[jax.Array, DeltaNetCache]:
        """`_read` and `_recur` at once."""
        carried = read_slots(cache.conv, slots)
        mixed, carried = causal_conv(inputs.mixed, self.conv1d.weight[...][:, 0], carried, counts)
        if taps.captures("state"):
            tokens = (*split_heads(mixed, counts, **self._sizes), inputs.g, inputs.beta)
            _keep_states(taps, tokens, slots, cache)
        output, state = delta_chunks(
            cache.state,
            slots,
            mixed,
            counts,
            inputs.g,
            inputs.beta,
            eps=L2_EPS,
            interpret=self.kernels.interpret,
        )
        return output, DeltaNetCache(conv=write_slots(cache.conv, slots, carried), state=state)

    def look(
        self, x: jax.Array, valid: jax.Array, slots: jax.Array, cache: DeltaNetCache
    ) -> tuple[jax.Array, DeltaNetInputs]:
        """The output of `__call__` for a few tokens, of which nothing is written.

        Returns:
            (as of `__call__`; what `accept` needs to write them).
        """
        inputs, gate = self._project(x, valid)
        # convolution inputs are small: each row's are copied, and the copies go
        rows = jnp.arange(x.shape[0], dtype=jnp.int32)
        copied = DeltaNetCache(conv=read_slots(cache.conv, slots), state=cache.state)
        tokens, _ = self._read(inputs, rows, copied, valid.sum(axis=1, dtype=jnp.int32))
        output, _ = _few(self.kernels, tokens, cache.state, slots, x.dtype.name, keep=True)
        return self._leave(output, gate, x.dtype), inputs

    def accept(
        self, inputs: DeltaNetInputs, counts: jax.Array, slots: jax.Array, cache: DeltaNetCache
    ) -> DeltaNetCache:
        """Writes the first tokens of a `look`.

        Args:
            inputs: of the look.
            counts: int32 [batch], tokens of each row to write, 0 for none.
            slots, cache: as they were for it.
        """
        token = (jnp.arange(inputs.g.shape[1]) < counts[:, None])[..., None]
        taken = DeltaNetInputs(
            mixed=inputs.mixed, g=jnp.where(token, inputs.g, 0), beta=jnp.where(token, inputs.beta, 0)
        )
        tokens, conv = self._read(taken, slots, cache, counts)
        _, state = _few(self.kernels, tokens, cache.state, slots, inputs.mixed.dtype.name, keep=False)
        return DeltaNetCache(conv=conv, state=state)

    def _project(self, x: jax.Array, valid: jax.Array) -> tuple[DeltaNetInputs, jax.Array]:
        """What is to be convolved, decay and write strength; and the output's gate."""
        projections = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        mixed, gate, b, a = linears(x, [held.matrix() for held in projections], kernels=self.kernels)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        beta = jax.nn.sigmoid(b).astype(wide)
        g = -jnp.exp(self.A_log[...].astype(wide)) * jax.nn.softplus(
            a.astype(wide) + self.dt_bias[...].astype(wide)
        )
        # A pad decays nothing, writes nothing: the state passes through unchanged.
        token = valid[..., None]
        inputs = DeltaNetInputs(mixed=mixed, g=jnp.where(token, g, 0), beta=jnp.where(token, beta, 0))
        return inputs, gate

    def _read(
        self, inputs: DeltaNetInputs, slots: jax.Array, cache: DeltaNetCache, counts: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """(query, key, value, g and beta as of `delta_rule_chunked`; convolution inputs after `counts`
        tokens of each row)."""
        x, weight, sizes = inputs.mixed, self.conv1d.weight[...][:, 0], self._sizes
        if self.kernels.pick("conv", x.dtype.name, x.shape[1]) == "native":
            query, key, value, conv = native_conv(
                x, weight, cache.conv, slots, counts, **sizes, variant=self.kernels.variant
            )
        else:
            carried = read_slots(cache.conv, slots)
            query, key, value, carried = conv_heads(x, weight, carried, counts, **sizes)
            conv = write_slots(cache.conv, slots, carried)
        return (query, key, value, inputs.g, inputs.beta), conv

    @property
    def _sizes(self) -> dict[str, int]:
        """Of the heads here, as `conv_heads` is told them."""
        return {
            "key_dim": self.config.linear_key_head_dim,
            "heads": self.A_log[...].shape[0],
            "value_dim": self.config.linear_value_head_dim,
        }

    def _leave(self, output: jax.Array, gate: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The layer's output from what the delta rule reads."""
        normed = gated_rms_norm(
            output.astype(dtype),
            gate.reshape(output.shape),
            self.norm.weight[...],
            self.config.rms_norm_eps,
        )
        flat = normed.reshape(*normed.shape[:2], -1)
        return self.ranks.head_product(flat, self.out_proj.matrix(), self.kernels)


def _keep_states(taps: Taps, tokens: tuple[jax.Array, ...], slots: jax.Array, cache: DeltaNetCache) -> None:
    """The states that were asked for, of tokens as of `delta_rule_chunked`."""
    if taps.captures("state") and taps.at is not None:
        taps.keep("state", states_behind(taps.at, tokens, read_slots(cache.state, slots)))


def states_behind(at: jax.Array, tokens: tuple[jax.Array, ...], before: jax.Array) -> jax.Array:
    """Recurrent states behind some of the tokens, to look at: float32 [batch, n, heads, Dk, Dv].

    Args:
        at: int32 [batch, n], places of tokens; -1 or less gives the state before all of them.
        tokens: query, key, value, g and beta, as of `delta_rule_chunked`.
        before: [batch, heads, Dk, Dv].
    """
    query, key, value, g, beta = tokens
    places = jnp.arange(g.shape[1])[:, None]

    def behind(place: jax.Array) -> jax.Array:
        taken = places <= place[:, None, None]  # the others decay nothing and write nothing
        some = (query, key, value, jnp.where(taken, g, 0), jnp.where(taken, beta, 0))
        return delta_rule_chunked(*some, before)[1].astype(jnp.float32)

    return jnp.moveaxis(lax.map(behind, at.T), 0, 1)


def _recur(
    kernels: Kernels, tokens: tuple[jax.Array, ...], state: jax.Array, slots: jax.Array, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule by the implementation that the table has.

    Args:
        kernels: the table.
        tokens: query, key, value, g and beta, as of `delta_rule_chunked`.
        state: [slots, heads, Dk, Dv]; kernels take float32 only.
        slots: int32 [batch], each row's own.
        dtype: name of the compute dtype.

    Returns:
        (output [batch, seq, heads, Dv], states after the last token).
    """
    seq = tokens[0].shape[1]
    if seq == 1:
        return _few(kernels, tokens, state, slots, dtype, keep=False)
    query, key, value, g, beta = tokens
    if state.dtype == jnp.float32 and kernels.pick("delta_chunks", dtype, seq) == "native":
        return native_delta_chunks(query, key, value, g, beta, state, slots, kernels.variant)
    output, after = delta_rule_chunked(query, key, value, g, beta, read_slots(state, slots))
    return output, write_slots(state, slots, after)


def _few(
    kernels: Kernels,
    tokens: tuple[jax.Array, ...],
    state: jax.Array,
    slots: jax.Array,
    dtype: str,
    *,
    keep: bool,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule a token at a time, so that how many there are changes no sum; arguments as of
    `_recur`.

    Args:
        keep: the states stay as they are.
    """
    query, key, value, g, beta = tokens
    chosen = kernels.pick("delta_step", dtype, 1) if state.dtype == jnp.float32 else None
    if chosen == "pallas_step":
        return delta_step(state, slots, query, key, value, g, beta, keep=keep, interpret=kernels.interpret)
    if chosen == "native":
        if keep:
            looked = native_delta_look(state, slots, query, key, value, g, beta, kernels.variant)
            return looked, state
        return native_delta_step(state, slots, query, key, value, g, beta, kernels.variant)
    if query.shape[1] == 1:
        query, key, value, g, beta = (x[:, 0] for x in tokens)
        query, key = (_repeat_heads(x, value.shape[1]) for x in (query, key))
        output, after = delta_rule_step(read_slots(state, slots), query, key, value, g, beta)
        output = output[:, None]
    else:
        output, after = delta_rule_scan(query, key, value, g, beta, read_slots(state, slots))
    return output, state if keep else write_slots(state, slots, after)


def read_slots(pool: jax.Array, slots: jax.Array) -> jax.Array:
    """Entries of a pool [slots, ...] for int32 [batch]; what a row without a slot gets means nothing."""
    return pool.at[slots].get(mode="clip")


def write_slots(pool: jax.Array, slots: jax.Array, values: jax.Array) -> jax.Array:
    """The pool with rows' entries in their slots; a row without one writes nothing."""
    return pool.at[slots].set(values.astype(pool.dtype), mode="drop")


def _repeat_heads(x: jax.Array, heads: int) -> jax.Array:
    """[batch, key_heads, dim] -> [batch, heads, dim]: value head h reads key head h // ratio."""
    return jnp.repeat(x, heads // x.shape[1], axis=1)

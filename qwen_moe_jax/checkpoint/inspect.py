"""What a checkpoint is and what it takes to run it, from config.json and headers alone."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

import jax.numpy as jnp

from qwen_moe_jax.checkpoint.layout import (
    count_elements,
    held_in_words,
    parameter_forms,
    parameter_shapes,
    stored_dtype,
    text_keys,
)
from qwen_moe_jax.checkpoint.names import canonical_name, is_side, skipped_family
from qwen_moe_jax.checkpoint.orbax import check_arrays, stored_arrays
from qwen_moe_jax.checkpoint.orbax_folder import is_orbax, refuse_unfinished
from qwen_moe_jax.checkpoint.reader import match_tensors
from qwen_moe_jax.checkpoint.safetensors_files import READABLE_DTYPES, stored_tensors
from qwen_moe_jax.checkpoint.stored_config import read_config
from qwen_moe_jax.config import DENSE, FULL_ATTENTION, ModelConfig
from qwen_moe_jax.errors import InputError

# Component -> how its parameters' names are recognised; the first that fits.
_COMPONENTS = (
    ("embedding", "embed_tokens."),
    ("Gated DeltaNet", ".linear_attn."),
    ("attention", ".self_attn."),
    ("router", ".mlp.gate."),
    ("routed experts", ".mlp.experts."),
    ("shared expert", ".mlp.shared_expert"),  # with its gate
    ("dense MLP", ".mlp."),
    ("norms", "norm."),
    ("lm_head", "lm_head."),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """A checkpoint in numbers; `str()` is the printed report.

    Attributes:
        folder: of the checkpoint.
        config: read from it.
        layout: "safetensors" or "Orbax", or None if the folder holds no weights.
        parameters: component -> number of parameters.
        active_parameters: component -> parameters that one token's forward reads: its own row of the
            embedding, top-k of the routed experts, everything else whole.
        stored_bytes: dtype -> bytes of the text model's weights on disk.
        skipped_bytes: family that text generation does not use -> its bytes on disk.
        loaded_bytes: dtype the matrices are held in -> bytes of all parameters in memory.
        kv_bytes_per_token: dtype the keys and values are held in -> bytes a token adds to the caches.
        state_bytes: recurrent state of one sequence, float32, whatever its length.
        conv_bytes: compute dtype -> bytes of the convolution inputs of one sequence.
        context: tokens of the example in the report.
    """

    folder: Path
    config: ModelConfig
    layout: str | None
    parameters: dict[str, int]
    active_parameters: dict[str, int]
    stored_bytes: dict[str, int]
    skipped_bytes: dict[str, int]
    loaded_bytes: dict[str, int]
    kv_bytes_per_token: dict[str, int]
    state_bytes: int
    conv_bytes: dict[str, int]
    context: int

    def __str__(self) -> str:
        return "\n".join(
            [*self.architecture_lines(), *self.parameter_lines(), *self._storage(), *self._caches()]
        )

    def architecture_lines(self) -> list[str]:
        """What the model is built of."""
        c = self.config
        embedding = "tied to lm_head" if c.tie_word_embeddings else "not tied to lm_head"
        delta_net = (
            f"  Gated DeltaNet   {c.linear_num_key_heads} key heads of {c.linear_key_head_dim}, "
            f"{c.linear_num_value_heads} value heads of {c.linear_value_head_dim}, "
            f"convolution over {c.linear_conv_kernel_dim} tokens"
        )
        return [
            f"{self.folder}: {c.family.title} text model",
            f"  layers           {c.num_hidden_layers} of width {c.hidden_size}: {layers_in_words(c)}",
            *([delta_net] if c.linear_num_key_heads else []),
            f"  attention        {c.num_attention_heads} query heads, {c.num_key_value_heads} key/value "
            f"heads of {c.head_dim}, {c.rotary_dim} rotated ({c.rope.kind}, theta {c.rope.theta:g})",
            *self._mlp_lines(),
            f"  vocabulary       {c.vocab_size}, embedding {embedding}",
            f"  context          {c.max_position_embeddings} tokens",
        ]

    def _mlp_lines(self) -> list[str]:
        c = self.config
        shared = f", and a shared one of width {c.shared_expert_intermediate_size}"
        experts = (
            f"  experts          {c.num_experts} of width {c.moe_intermediate_size}, "
            f"top-{c.num_experts_per_tok}{shared if c.shared_expert_intermediate_size else ''}"
        )
        dense = f"  dense MLP        of width {c.intermediate_size}, in {c.mlp_types.count(DENSE)} layers"
        return [*([experts] if c.num_experts else []), *([dense] if DENSE in c.mlp_types else [])]

    def parameter_lines(self) -> list[str]:
        """A table of parameters by component."""
        rows = [*self.parameters, "total"]
        total = self.parameters | {"total": sum(self.parameters.values())}
        active = self.active_parameters | {"total": sum(self.active_parameters.values())}
        return [
            f"{'parameters':<19}{'all':>16}{'active a token':>18}",
            *(f"  {row:<17}{total[row]:>16,}{active[row]:>18,}" for row in rows),
        ]

    def _storage(self) -> list[str]:
        if self.layout is None:
            lines = ["on disk            no weights in this folder, only config.json"]
        else:
            parts = ", ".join(f"{size_in_words(n)} of {dtype}" for dtype, n in self.stored_bytes.items())
            lines = [f"on disk            {parts} ({self.layout})"]
        if self.skipped_bytes:
            parts = ", ".join(f"{family} {size_in_words(n)}" for family, n in self.skipped_bytes.items())
            lines.append(f"  not loaded       {parts}")
        loaded = " or ".join(
            f"{size_in_words(n)} with {dtype} matrices" for dtype, n in self.loaded_bytes.items()
        )
        return [*lines, f"in memory          {loaded}"]

    def _caches(self) -> list[str]:
        kv = " or ".join(f"{size_in_words(n)} in {dtype}" for dtype, n in self.kv_bytes_per_token.items())
        conv = " or ".join(f"{size_in_words(n)} in {dtype}" for dtype, n in self.conv_bytes.items())
        fixed = {dtype: self.state_bytes + conv_bytes for dtype, conv_bytes in self.conv_bytes.items()}
        sequence = " or ".join(
            f"{size_in_words(self.context * n + fixed[dtype])} in {dtype}"
            for dtype, n in self.kv_bytes_per_token.items()
        )
        lines = [f"a token            {kv} of keys and values"]
        if not self.state_bytes:
            return [*lines, f"  {self.context} of them: {sequence}"]
        return [
            *lines,
            f"a sequence         {size_in_words(self.state_bytes)} of recurrent state in float32, "
            f"convolution {conv}",
            f"  of {self.context} tokens: {sequence}",
        ]


def inspect_checkpoint(folder: str | Path, *, context: int | None = None) -> CheckpointSummary:
    """Summarises a checkpoint folder; reads config.json and headers, no weights.

    Args:
        folder: in Hugging Face or Orbax layout, or with config.json only.
        context: tokens of the memory example; None means the configuration's maximum.

    Raises:
        CheckpointNotFoundError: no config.json.
        ConfigError: a configuration that is not implemented.
        CheckpointError: weights that are unfinished, damaged, or do not fit the configuration.
        InputError: `context` is not a positive integer.
    """
    folder = Path(folder)
    if context is not None and (not isinstance(context, int) or context < 1):
        raise InputError(f"context is {context!r}; expected a positive number of tokens.")
    refuse_unfinished(folder)
    config = read_config(folder)
    shapes, forms = parameter_shapes(config), parameter_forms(config)
    layout, stored, skipped = _stored(folder, config, shapes)
    counts = {n: count_elements(n, s, forms) for n, s in shapes.items() if not is_side(n)}
    full = config.layer_types.count(FULL_ATTENTION)
    linear = config.num_hidden_layers - full
    kv = 2 * full * config.num_key_value_heads * config.head_dim
    conv = linear * (config.linear_conv_kernel_dim - 1) * config.conv_channels
    head_state = config.linear_key_head_dim * config.linear_value_head_dim
    itemsizes = {"bfloat16": 2, "float32": 4}
    return CheckpointSummary(
        folder=folder,
        config=config,
        layout=layout,
        parameters=by_component(counts),
        active_parameters=by_component({n: _active(config, n, count) for n, count in counts.items()}),
        stored_bytes=stored,
        skipped_bytes=skipped,
        loaded_bytes={
            held_in_words(config, dtype): sum(
                prod(s) * stored_dtype(n, forms, jnp.dtype(dtype)).itemsize for n, s in shapes.items()
            )
            for dtype in itemsizes
        },
        kv_bytes_per_token={dtype: kv * size for dtype, size in itemsizes.items()},
        state_bytes=linear * config.linear_num_value_heads * head_state * 4,
        conv_bytes={dtype: conv * size for dtype, size in itemsizes.items()},
        context=config.max_position_embeddings if context is None else context,
    )


def layers_in_words(config: ModelConfig) -> str:
    """How many there are of each token mixer."""
    full = config.layer_types.count(FULL_ATTENTION)
    linear = f"{config.num_hidden_layers - full} Gated DeltaNet, " if config.linear_num_key_heads else ""
    return f"{linear}{full} full attention"


def by_component(counts: Mapping[str, int]) -> dict[str, int]:
    """Canonical name -> number, summed by component, in the order of a token's way."""
    sums = dict.fromkeys((component for component, _ in _COMPONENTS), 0)
    for name, count in counts.items():
        sums[next(component for component, mark in _COMPONENTS if mark in name)] += count
    return {component: total for component, total in sums.items() if total}


def _active(config: ModelConfig, name: str, count: int) -> int:
    if ".mlp.experts." in name:
        return count // config.num_experts * config.num_experts_per_tok
    if name == "embed_tokens.weight" and not config.tie_word_embeddings:
        return config.hidden_size
    return count


def _stored(
    folder: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> tuple[str | None, dict[str, int], dict[str, int]]:
    """(layout, dtype -> bytes of the text model, skipped family -> bytes), checked against the shapes."""
    stored: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    if is_orbax(folder):
        arrays = stored_arrays(folder)
        check_arrays(folder, arrays, shapes, parameter_forms(config))
        for array in arrays.values():
            stored[array.dtype.name] += array.size * array.dtype.itemsize
        return "Orbax", dict(stored), {}
    if not any(folder.glob("*.safetensors*")):
        return None, {}, {}
    tensors = stored_tensors(folder)
    match_tensors(folder, tensors, shapes, text_keys(config))
    for key, tensor in tensors.items():
        if canonical_name(key) is not None:
            stored[READABLE_DTYPES[tensor.dtype].name] += tensor.nbytes
        else:
            skipped[str(skipped_family(key))] += tensor.nbytes
    return "safetensors", dict(stored), dict(skipped)


def size_in_words(count: int) -> str:
    """A number of bytes in a unit that suits it."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"

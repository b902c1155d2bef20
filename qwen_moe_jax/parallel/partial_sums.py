"""Per-rank parts of a sum, typed so that a part can neither be forgotten nor be taken for the whole.

Inside `jax.shard_map` JAX types each value, along each mesh axis, as the same on all ranks ("invarying"),
as different ("varying"), or as "unreduced": a part of a sum that is still to be taken. Only these
functions make unreduced values here. Two parts add; a part and a whole value do not (`ShardingTypeError`
while tracing): a replicated shared expert added to the parts of the routed experts would be counted once
a rank, which is the bug this project was born of. Nor can a part be squared, normalised, multiplied
or returned as if it were the sum. And only a part can be summed over ranks.

What the types cannot see is a replicated value added to a rank's product *before* that was declared a part:
to JAX the sum differs between ranks, as the product did. So parts are declared where they are computed, in
`product_part` and in the answers of `MeshRanks`, which type what leaves the model's mixture of experts,
and nothing else calls `as_part`. A test reads the sources for that; `check_layout` compares the numbers.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_moe_jax.formats.block_scaled import Matrix
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.kernels.varying import unreduced_axes, varying_axes
from qwen_moe_jax.model.linear import linear

Axes = tuple[str, ...]


def as_part(x: jax.Array, axes: Axes) -> jax.Array:
    """Declares what each rank computed to be its part of a sum over `axes`.

    Args:
        x: differs over every one of the axes; a value that is the same on several ranks is no part of a
            sum (see `divided_among`).
        axes: mesh axes; none means that x is the sum already.

    Raises:
        ValueError: while tracing, if x is the same on all ranks of an axis, or a part already.
    """
    already = unreduced_axes(x)
    if already:
        raise ValueError(
            f"a value that is a part of a sum over {_names(already)} already was declared one over "
            f"{_names(axes)}: declare a part once, where it is computed, with all axes of its sum."
        )
    same = set(axes) - varying_axes(x)
    if same:
        raise ValueError(
            f"a value that is the same on every rank along {_names(same)} is not a part of a sum "
            "over them: it would be counted once a rank. Use divided_among, or add it after the sum."
        )
    return lax.pcast(x, axes, to="unreduced") if axes else x


def product_part(x: jax.Array, weight: Matrix, axes: Axes, kernels: Kernels | None = None) -> jax.Array:
    """x @ weight^T in float32, where the contracted dimension is divided among `axes`: a part of the product.

    x [..., inner held here] and weight [out, inner held here] -> float32 [..., out], unreduced over `axes`.
    """
    return as_part(linear(x, weight, jnp.float32, kernels=kernels), axes)


def divided_among(x: jax.Array, axes: Axes) -> jax.Array:
    """A value that is the same on all ranks of `axes`, as equal parts of a sum: each rank has 1/n of it."""
    if not axes:
        return x
    share = x / lax.axis_size(axes)
    return lax.pcast(share, axes, to="varying")


def total(part: jax.Array, axes: Axes, dtype: DTypeLike | None = None) -> jax.Array:
    """The sum of all ranks' parts, on every one of them: one all-reduce.

    Args:
        part: of the sum.
        axes: mesh axes that it is summed over; none means that it is the sum.
        dtype: that parts are rounded to and travel in; None means their own. The sum has the parts' dtype.

    Raises:
        ValueError: while tracing, if `part` is not typed as a part of a sum over every one of the axes.
    """
    _check_part(part, axes)
    return lax.psum(part.astype(dtype or part.dtype), axes).astype(part.dtype) if axes else part


def all_reduced(x: jax.Array, axes: Axes) -> jax.Array:
    """Every rank's own x, summed over `axes`: what `total` costs, to be measured."""
    return total(as_part(x, axes), axes)


def scattered_total(
    part: jax.Array, axes: Axes, dtype: DTypeLike | None = None, dimension: int = 0
) -> jax.Array:
    """The sum of all ranks' parts, of which each rank gets an equal slice: one reduce-scatter.

    Args:
        part, axes, dtype: as of `total`; at least one axis.
        dimension: that is sliced, in the order in which `gathered` puts slices behind one another.

    Raises:
        ValueError: as `total`.
    """
    _check_part(part, axes)
    travelling = part.astype(dtype or part.dtype)
    return lax.psum_scatter(travelling, axes, scatter_dimension=dimension, tiled=True).astype(part.dtype)


def gathered(x: jax.Array, axes: Axes, dimension: int) -> jax.Array:
    """Every rank's x behind one another along `dimension`, on every rank: one all-gather."""
    return lax.all_gather(x, axes, axis=dimension, tiled=True, to="invarying") if axes else x


def own_slice(x: jax.Array, axes: Axes, dimension: int) -> jax.Array:
    """This rank's equal slice of what all ranks of `axes` have, as `scattered_total` divides it."""
    size = x.shape[dimension] // lax.axis_size(axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size, dimension)


def _check_part(part: jax.Array, axes: Axes) -> None:
    missing = set(axes) - unreduced_axes(part)
    if missing:
        raise ValueError(
            f"a value that is not typed as a part of a sum over {_names(missing)} was to be summed over the "
            "ranks: what every rank has whole would be counted once a rank. Make parts with product_part."
        )


def _names(axes: Iterable[str]) -> str:
    return ", ".join(sorted(axes))

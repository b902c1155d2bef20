"""Per-rank parts of a sum, typed so that a part can neither be forgotten nor be taken for the whole.

Inside `jax.shard_map` JAX types each value, along each mesh axis, as the same on all ranks ("invarying"),
as different ("varying"), or as "unreduced": a part of a sum that is still to be taken. Only these
functions make unreduced values here. Two parts add; a part and a whole value do not (`ShardingTypeError`
while tracing): a replicated shared expert added to the parts of the routed experts would be counted once
a rank, which is the bug this project was born of. Nor can a part be squared, normalised, multiplied
or returned as if it were the sum.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qwen_moe_jax.model.linear import linear
from qwen_moe_jax.model.varying import varying_axes

Axes = tuple[str, ...]


def as_part(x: jax.Array, axes: Axes) -> jax.Array:
    """Declares what each rank computed to be its part of a sum over `axes`.

    Args:
        x: differs over every one of the axes; a value that is the same on several ranks is no part of a
            sum (see `divided_among`).
        axes: mesh axes; none means that x is the sum already.

    Raises:
        ValueError: while tracing, if x is the same on all ranks of an axis.
    """
    same = set(axes) - varying_axes(x)
    if same:
        raise ValueError(
            f"a value that is the same on every rank along {', '.join(sorted(same))} is not a part of a sum "
            "over them: it would be counted once a rank. Use divided_among, or add it after the sum."
        )
    return lax.pcast(x, axes, to="unreduced") if axes else x


def product_part(x: jax.Array, weight: jax.Array, axes: Axes) -> jax.Array:
    """x @ weight^T in float32, where the contracted dimension is divided among `axes`: a part of the product.

    x [..., inner held here] and weight [out, inner held here] -> float32 [..., out], unreduced over `axes`.
    """
    return as_part(linear(x, weight, jnp.float32), axes)


def divided_among(x: jax.Array, axes: Axes) -> jax.Array:
    """A value that is the same on all ranks of `axes`, as equal parts of a sum: each rank has 1/n of it."""
    if not axes:
        return x
    share = x / lax.axis_size(axes)
    return lax.pcast(share, axes, to="varying")


def total(part: jax.Array, axes: Axes) -> jax.Array:
    """The sum of all ranks' parts, on every one of them: one all-reduce."""
    return lax.psum(part, axes) if axes else part


def scattered_total(part: jax.Array, axis: str) -> jax.Array:
    """The sum of all ranks' parts [n * rows, ...]; rank r gets rows r * rows and on: one reduce-scatter."""
    return lax.psum_scatter(part, axis, scatter_dimension=0, tiled=True)


def gathered(x: jax.Array, axes: Axes, dimension: int) -> jax.Array:
    """Every rank's x behind one another along `dimension`, on every rank: one all-gather."""
    return lax.all_gather(x, axes, axis=dimension, tiled=True, to="invarying") if axes else x

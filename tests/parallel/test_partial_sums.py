"""The type system of partial sums: the over-count, its opposite and every other mix-up do not trace."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.model.norms import rms_norm
from qwen_moe_jax.parallel.mesh import make_mesh
from qwen_moe_jax.parallel.partial_sums import (
    as_part,
    divided_among,
    gathered,
    product_part,
    scattered_total,
    total,
)

try:
    from jax.errors import ShardingTypeError
except ImportError:  # jax 0.10 keeps it to itself
    from jax._src.core import ShardingTypeError

TOKENS, HIDDEN, INNER = 8, 6, 12
GROUP = ("expert", "tensor")
REPLICATED = P()


def inputs(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens [TOKENS, HIDDEN], inner activations [TOKENS, INNER], down matrix [HIDDEN, INNER])."""
    rng = np.random.default_rng(seed)
    shapes = ((TOKENS, HIDDEN), (TOKENS, INNER), (HIDDEN, INNER))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)  # type: ignore


def on_mesh(
    function: Callable[..., jax.Array], *, out: P = REPLICATED, axes: tuple[str, ...] = GROUP
) -> jax.Array:
    """function(x, the rank's slice of the activations, of the matrix) on a 2 x 2 mesh."""
    sharded = jax.shard_map(
        function,
        mesh=make_mesh(expert=2, tensor=2),
        in_specs=(P(), P(None, axes), P(None, axes)),
        out_specs=out,
    )
    return jax.jit(sharded)(*inputs())


def whole() -> np.ndarray:
    _, inner, down = (np.asarray(value, np.float64) for value in inputs())
    return inner @ down.T


def assert_close(found: jax.Array, wanted: np.ndarray) -> None:
    # sums of 12 products of order one in float32, in another order
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_the_sum_of_the_parts_is_the_product() -> None:
    assert_close(on_mesh(lambda x, a, w: total(product_part(a, w, GROUP), GROUP)), whole())


def test_a_replicated_value_divided_among_the_ranks_counts_once() -> None:
    x = np.asarray(inputs()[0], np.float64)

    def shared_inside(x, a, w):
        part = product_part(a, w, GROUP) + as_part(divided_among(x, GROUP), GROUP)
        return total(part, GROUP)

    assert_close(on_mesh(shared_inside), whole() + x)
    assert_close(on_mesh(lambda x, a, w: total(product_part(a, w, GROUP), GROUP) + x), whole() + x)


def test_the_upstream_bug_does_not_trace() -> None:
    """A replicated shared expert added to the routed parts before the all-reduce: ep_size times too much."""

    def over_count(x, a, w):
        routed = product_part(a, w, GROUP)
        shared = x  # computed alike on every rank
        return total(routed + shared, GROUP)

    with pytest.raises(ShardingTypeError, match="unreduced"):
        on_mesh(over_count)


def test_declaring_a_replicated_value_a_part_does_not_trace_either() -> None:
    def over_count(x, a, w):
        return total(product_part(a, w, GROUP) + as_part(x, GROUP), GROUP)

    with pytest.raises(ValueError, match=r"same on every rank along expert, tensor.*counted once a rank"):
        on_mesh(over_count)


def test_a_value_replicated_along_one_axis_only_is_no_part_along_both() -> None:
    """tokenspeed's bug: the shared expert divided along another group than the sum is taken over."""

    def tensor_only(x, a, w):
        return total(product_part(a, w, GROUP), GROUP)

    with pytest.raises(ValueError, match="same on every rank along expert"):
        on_mesh(tensor_only, axes=("tensor",))


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda part, x: rms_norm(part, jnp.zeros(HIDDEN), 1e-6), "unreduced"),
        (lambda part, x: jax.nn.silu(part), "unreduced"),
        (lambda part, x: part * x, "reduced"),
        (lambda part, x: x + part, "unreduced"),
        (lambda part, x: part @ jnp.ones((HIDDEN, 3)), "unreduced"),
        (lambda part, x: part, "replication"),
    ],
    ids=["normalised", "activated", "gated", "residual", "multiplied", "returned"],
)
def test_a_part_cannot_be_used_as_if_it_were_the_sum(use: Callable[..., jax.Array], why: str) -> None:
    """The opposite bug, of vllm and tpu-inference: a partial sum that is never reduced."""
    with pytest.raises((ShardingTypeError, NotImplementedError, ValueError), match=why):
        on_mesh(lambda x, a, w: use(product_part(a, w, GROUP), x))


def test_a_sum_that_was_forgotten_before_it_got_a_type_does_not_trace_either() -> None:
    """A rank's own product, never declared a part: it differs between ranks, as does all that it touches."""
    with pytest.raises(ValueError, match="replication"):
        on_mesh(lambda x, a, w: x + a @ w.T)


def test_summing_over_one_axis_leaves_a_part_over_the_other() -> None:
    def twice(x, a, w):
        return total(total(product_part(a, w, GROUP), ("tensor",)), ("expert",))

    assert_close(on_mesh(twice), whole())
    with pytest.raises(ValueError, match="replication"):
        on_mesh(lambda x, a, w: total(product_part(a, w, GROUP), ("tensor",)))


def test_a_scattered_total_gives_each_rank_its_rows() -> None:
    def scattered(x, a, w):
        return total(scattered_total(product_part(a, w, GROUP), "expert"), ("tensor",))

    assert_close(on_mesh(scattered, out=P("expert")), whole())
    assert_close(on_mesh(lambda x, a, w: gathered(scattered(x, a, w), ("expert",), 0)), whole())

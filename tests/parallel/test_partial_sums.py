"""The type system of partial sums: the over-count, its opposite and every other mix-up do not trace."""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.configs import random_config

import qwen_moe_jax
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import with_parameters
from qwen_moe_jax.model.linear import linear
from qwen_moe_jax.model.norms import rms_norm
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.forward import layout_decoder
from qwen_moe_jax.parallel.layout import Layout
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
FLOAT32 = DtypePolicy(compute=jnp.dtype(jnp.float32), matrix=jnp.dtype(jnp.float32))
CONFIG = ModelConfig.from_dict({"model_type": "qwen3_5_moe_text", **random_config(22)})


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


@pytest.mark.parametrize(
    "summed",
    [
        lambda x, a, w: total(linear(a, w) + x, GROUP),
        lambda x, a, w: total(x, GROUP),
        lambda x, a, w: total(a @ w.T, GROUP),
        lambda x, a, w: total(total(product_part(a, w, GROUP), GROUP), GROUP),
        lambda x, a, w: scattered_total(linear(a, w) + x, ("expert",)),
    ],
    ids=["added before it got a type", "replicated", "untyped", "summed twice", "scattered"],
)
def test_only_a_part_can_be_summed(summed: Callable[..., jax.Array]) -> None:
    with pytest.raises(ValueError, match=r"not typed as a part of a sum over expert.*counted once a rank"):
        on_mesh(summed)


def test_a_part_is_declared_once() -> None:
    with pytest.raises(ValueError, match="a part of a sum over expert, tensor already"):
        on_mesh(lambda x, a, w: total(as_part(product_part(a, w, GROUP), GROUP), GROUP))


@pytest.mark.parametrize("mode", ["prescaled", "outside", "sharded"])
def test_the_models_own_branches_add_only_as_parts_of_one_sum(mode: str) -> None:
    """The upstream bug with the model's own mixture of experts, on a mesh of 2 x 2."""
    layout = Layout(CONFIG, make_mesh(expert=2, tensor=2), shared_expert=mode)
    mlp = layout_decoder(layout, FLOAT32, Kernels("cpu")).layers[0].mlp
    prefix = "layers.0.mlp."
    structs = {name: target.struct for name, target in layout.targets(FLOAT32).items()}
    given = {n.removeprefix(prefix): s for n, s in structs.items() if n.startswith(prefix)}
    specs = {name: layout.spec(prefix + name, struct.ndim) for name, struct in given.items()}

    def mixture(parameters, x, wrong):
        moe = with_parameters(mlp, parameters)
        ids = jnp.zeros((TOKENS, 2), jnp.int32) + jax.lax.axis_index("expert")
        routed = moe.combine(x, ids, jnp.ones((TOKENS, 2)), ranks=2)
        return total(wrong(routed, moe.shared(x)), GROUP)

    def trace(wrong):
        mapped = jax.shard_map(
            lambda parameters, x: mixture(parameters, x, wrong),
            mesh=layout.mesh,
            in_specs=(specs, P()),
            out_specs=P(),
        )
        jax.eval_shape(mapped, given, jax.ShapeDtypeStruct((TOKENS, CONFIG.hidden_size), jnp.float32))

    if mode == "outside":
        with pytest.raises(ShardingTypeError, match="unreduced"):
            trace(lambda routed, shared: routed + shared)
    else:
        trace(lambda routed, shared: routed + shared)
    for wrong in (
        lambda routed, shared: routed + total(shared, ("tensor",)),
        lambda routed, shared: as_part(routed + jnp.ones_like(routed), GROUP),
    ):
        with pytest.raises((ShardingTypeError, ValueError), match=r"unreduced|part of a sum"):
            trace(wrong)


def test_parts_are_declared_at_their_sources_only() -> None:
    """What the types cannot see (a value added before the declaration) has few places to happen in."""
    package = Path(qwen_moe_jax.__file__).parent
    sources = {str(file.relative_to(package)): file.read_text() for file in package.rglob("*.py")}
    declaring = {name for name, text in sources.items() if "as_part" in text}
    assert declaring == {"parallel/partial_sums.py", "parallel/ranks.py"}
    primitives = re.compile(r"\b(psum|psum_scatter|pcast)\(")
    reducing = {name for name, text in sources.items() if primitives.search(text)}
    assert reducing == {"parallel/partial_sums.py", "kernels/varying.py"}


def test_a_value_replicated_along_one_axis_only_is_no_part_along_both() -> None:
    """tokenspeed's bug: the shared expert divided along another group than the sum is taken over."""

    def tensor_only(x, a, w):
        return total(product_part(a, w, GROUP), GROUP)

    with pytest.raises(ValueError, match="same on every rank along expert"):
        on_mesh(tensor_only, axes=("tensor",))


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda part, x: rms_norm(part, jnp.zeros(HIDDEN), 1e-6, 1.0), "unreduced"),
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
        return total(scattered_total(product_part(a, w, GROUP), ("expert",)), ("tensor",))

    assert_close(on_mesh(scattered, out=P("expert")), whole())
    assert_close(on_mesh(lambda x, a, w: gathered(scattered(x, a, w), ("expert",), 0)), whole())

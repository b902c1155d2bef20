"""Why matrices are held in float32 on CPU, and why the product is written with a transposed matrix.

    python benchmarks/linear.py [--least]
    python benchmarks/linear.py --codes [--least] [--tokens 1 8]

bfloat16 activations times a [8192, 1024] matrix, and through experts of [512, 1024] read in place from a
stack of 64. The tables are in `benchmarks/README.md`, "Held dtype on CPU".

With `--codes`, the C++ kernels by number format: microseconds of a [4096, 4096] product and of a layer of 64
experts, top-8 (hidden 2048, intermediate 512), and the gigabytes of matrices that are read in a second.
Products follow one another over so many matrices, and layers over so many experts, that none is in a cache.
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import median_ms

from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix
from qwen_moe_jax.formats.codes import MatrixFormat
from qwen_moe_jax.kernels.cpu.build import native_variant
from qwen_moe_jax.kernels.cpu.calls import native_experts, native_linears
from qwen_moe_jax.model.linear import linear

OUT, IN = 8192, 1024
EXPERTS, EXPERT_OUT, USED = 64, 512, 8
BATCHES = (1, 8, 128, 512)
ROUNDS = 15


def last_axes(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same product as one contraction of both last axes, without a transpose."""
    product = lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product.astype(x.dtype)


def through_experts(product: Callable[..., jax.Array], x: jax.Array, stack: jax.Array) -> jax.Array:
    """The products with some experts, chosen at run time, summed: [tokens, 512]."""
    chosen = jnp.argsort(x[0, :EXPERTS])[:USED]
    return sum(product(x, lax.dynamic_index_in_dim(stack, chosen[i], keepdims=False)) for i in range(USED))


def table(
    forms: dict[str, tuple[Callable[..., jax.Array], jax.Array]],
    rng: np.random.Generator,
    title: str,
    least: bool,
) -> None:
    """One row a number of tokens, one column a form."""
    print(f"| {title} | {' | '.join(forms)} |\n|{'---|' * (len(forms) + 1)}")
    for tokens in BATCHES:
        x = jnp.asarray(rng.normal(size=(tokens, IN)), jnp.bfloat16)
        calls = {name: partial(jax.jit(form), x, weight) for name, (form, weight) in forms.items()}
        taken = median_ms(calls, ROUNDS, least)
        print(f"| {tokens} | {' | '.join(f'{taken[name]:.2f}' for name in forms)} |", flush=True)
    print()


# Number format, block, dtype of the scales; None is bfloat16.
FORMATS = {
    "bf16": None,
    "fp8 128x128": MatrixFormat("e4m3", (128, 128)),
    "int8 g128": MatrixFormat("int8", (1, 128), "bfloat16"),
    "int4 g128": MatrixFormat("int4", (1, 128), "bfloat16"),
    "int4 g32": MatrixFormat("int4", (1, 32), "bfloat16"),
    "int4 g128 zeros": MatrixFormat("int4", (1, 128), "float16", zeros=True),
    "mxfp4": MatrixFormat("e2m1", (1, 32), "float8_e8m0fnu"),
}
CODES_TOKENS = (1, 2, 4, 8, 64, 512)
SIZE = 4096  # of a square matrix
OUT_OF_CACHE = 96 << 20  # bytes
HIDDEN, INNER, TOP_K = 2048, 512, 8


def draw(rng: np.random.Generator, shape: tuple[int, ...], form: MatrixFormat | None) -> Matrix:
    """A matrix or stack whose numbers are of order one over the root of its columns."""
    if form is None:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5, jnp.bfloat16)
    values = rng.integers(0, 256, form.values_shape(shape), np.uint8)
    if form.codes == "e4m3":
        values = np.where((values & 0x7F) == 0x7F, 0, values).view(jnp.float8_e4m3fn)
    typical = {"e4m3": 130, "int8": 74, "int4": 4.6, "e2m1": 2.9}[form.codes] * shape[-1] ** 0.5
    scales = np.full(form.scales_shape(shape), 2.0 ** -round(np.log2(typical)))
    zeros = rng.integers(0, 16, scales.shape, np.uint8) if form.zeros else None
    return BlockScaled(
        jnp.asarray(values),
        jnp.asarray(scales.astype(form.scale_dtype)),
        form.block,
        jnp.dtype(jnp.bfloat16),
        "bits",
        form.codes,
        None if zeros is None else jnp.asarray(zeros),
    )


def bytes_of(*matrices: Matrix) -> int:
    """That a product reads."""
    return sum(x.nbytes for x in jax.tree.leaves(matrices))


def codes_table(
    title: str,
    tokens: tuple[int, ...],
    calls: Callable[..., tuple[Callable[[], jax.Array], int, int]],
    least: bool,
) -> None:
    """One row a format. calls(form, tokens) -> (something to run, how many products it is, bytes of one)."""
    cells: dict[str, list[str]] = {name: [] for name in FORMATS}
    for count in tokens:
        given = {name: calls(form, count) for name, form in FORMATS.items()}
        rounds = 5 if count > 8 else 2 * ROUNDS
        taken = median_ms({name: call for name, (call, _, _) in given.items()}, rounds, least)
        for name, (_, products, size) in given.items():
            seconds = taken[name] / 1e3 / products
            cells[name] += [f"{1e6 * seconds:.0f}", f"{size / seconds / 1e9:.1f}"]
    print(f"| {title} | {' | '.join(f'{count} us | GB/s' for count in tokens)} |")
    print(f"|{'---|' * (2 * len(tokens) + 1)}")
    for name in FORMATS:
        print(f"| {name} | {' | '.join(cells[name])} |", flush=True)
    print()


def codes_tables(tokens: tuple[int, ...], least: bool) -> None:
    """Products and expert layers of the C++ kernels, by number format."""
    variant = native_variant()
    assert variant is not None, "there is no compiler"
    rng = np.random.default_rng(0)
    held: dict[MatrixFormat | None, list[Matrix]] = {}

    @jax.jit
    def products(x: jax.Array, matrices: list[Matrix]) -> jax.Array:
        for matrix in matrices:
            x = native_linears(x, [matrix], [jnp.bfloat16], variant)[0]
        return x

    def product(form: MatrixFormat | None, count: int) -> tuple[Callable[[], jax.Array], int, int]:
        if form not in held:
            one = draw(rng, (SIZE, SIZE), form)
            copies = -(-OUT_OF_CACHE // bytes_of(one))
            held[form] = [jax.tree.map(lambda x: x + 0, one) for _ in range(copies)]
        some = held[form][: 2 if count > 8 else None]
        x = jnp.asarray(rng.normal(size=(count, SIZE)), jnp.bfloat16)
        return partial(products, x, some), len(some), bytes_of(some[0])

    codes_table("product, tokens:", tokens, product, least)
    held.clear()

    @jax.jit
    def layers(
        x: jax.Array, routes: list[jax.Array], weights: jax.Array, gate_up: Matrix, down: Matrix
    ) -> jax.Array:
        for ids in routes:
            y = native_experts(x, ids, weights, gate_up, down, variant=variant)
            x = (x + y).astype(x.dtype)
        return x

    def layer(form: MatrixFormat | None, count: int) -> tuple[Callable[[], jax.Array], int, int]:
        if form not in held:
            shapes = ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
            held[form] = [draw(rng, shape, form) for shape in shapes]
        # the first token's routes visit all experts in turn, so that none is read again soon
        draws = np.random.default_rng(count)
        order = draws.permutation(EXPERTS).reshape(-1, TOP_K)
        routes = []
        for first in order[: 2 if count > 8 else None]:
            ids = np.argsort(draws.uniform(size=(count, EXPERTS)), axis=1)[:, :TOP_K]
            ids[0] = first
            routes.append(jnp.asarray(ids, jnp.int32))
        read = np.mean([len(np.unique(ids)) for ids in routes]) / EXPERTS
        x = jnp.asarray(draws.normal(size=(count, HIDDEN)), jnp.bfloat16)
        weights = jnp.full((count, TOP_K), 1 / TOP_K, jnp.float32)
        call = partial(layers, x, routes, weights, *held[form])
        return call, len(routes), int(bytes_of(*held[form]) * read)

    codes_table("experts, tokens:", tokens, layer, least)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--least", action="store_true", help="the least of the rounds, not the median")
    parser.add_argument("--codes", action="store_true", help="the C++ kernels by number format")
    parser.add_argument("--tokens", type=int, nargs="+", default=CODES_TOKENS, help="with --codes")
    options = parser.parse_args()
    least = options.least
    if options.codes:
        print(f"jax {jax.__version__}, {native_variant()}, {'least' if least else 'medians'}\n")
        return codes_tables(tuple(options.tokens), least)
    rng = np.random.default_rng(0)
    statistic = "least" if least else "medians"
    print(f"jax {jax.__version__}, {jax.default_backend()}, {statistic} of {ROUNDS}, ms\n")
    matrix = jnp.asarray(rng.normal(size=(OUT, IN)), jnp.bfloat16)
    stack = jnp.asarray(rng.normal(size=(EXPERTS, EXPERT_OUT, IN)), jnp.bfloat16)
    for title, wrap, weight in (
        ("tokens, one matrix", lambda form: form, matrix),
        ("tokens, 8 experts", lambda form: partial(through_experts, form), stack),
    ):
        forms = {
            f"held {held}{name}": (wrap(form), weight.astype(held))
            for held in ("bfloat16", "float32")
            for name, form in (("", linear), (", last axes", last_axes))
        }
        table(forms, rng, title, least)


if __name__ == "__main__":
    main()

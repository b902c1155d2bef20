"""The time model's predictions for the 397B beside what others published of it on MI355X.

    python benchmarks/published.py

Nothing is measured here. Published results are of SGLang, whose programs run as HIP graphs, sum in bfloat16
and fuse more. Predictions are for three programs: this library's as they run (graphs off,
`Kernels.compiler_options`), the same as if they ran in graphs, and `ENGINE` in graphs. No assumption was
fitted to these results (`aot/assumptions.py` fits RCCL's table alone). `ENGINE`'s counts are a guess, made
after a first look at one of them (4 GPUs, 32 requests), and before the others.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from qwen_moe_jax.aot.assumptions import assumptions_for
from qwen_moe_jax.aot.times import DECODING, READING, Program, TimeModel
from qwen_moe_jax.configs import find_config
from qwen_moe_jax.devices import find_device
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import abstract_mesh

BFLOAT16 = jnp.dtype(jnp.bfloat16)
POLICY = DtypePolicy(compute=BFLOAT16, matrix=BFLOAT16)
# An engine with hand-fused kernels, as layers look on paper: SGLang's own counts are unpublished.
ENGINE = Program(linear=25, full=22, step=30, draft=30, passes=20)
PROGRAMS = (
    ("as it runs", DECODING, READING, False),
    ("in graphs", DECODING, READING, True),
    ("fused, in graphs", ENGINE, ENGINE, True),
)
# 1 + a + a^2 + a^3 = 3.49 tokens a step, as ATOM reports of its three drafts.
ACCEPTANCE = 0.91


@dataclasses.dataclass(frozen=True)
class Result:
    """One published number.

    Attributes:
        source: where it stands.
        what: was served.
        unit: of both numbers.
        published: the number.
        predict: the same by a time model.
        tensor: GPUs.
        float8: the weights.
        model: of `configs`.
    """

    source: str
    what: str
    unit: str
    published: float
    predict: Callable[[TimeModel], float]
    tensor: int
    float8: bool = True
    model: str = "397b"


def time_model(result: Result, decoding: Program, reading: Program, graphs: bool) -> TimeModel:
    """Of the published layout: every matrix in slices."""
    config = find_config(result.model, dtype="float8" if result.float8 else None)
    layout = Layout(config, abstract_mesh(1, 1, result.tensor), "tensor", "sharded", "psum", ragged=True)
    device = find_device("mi355x")
    return TimeModel(layout, POLICY, device, assumptions_for(device, graphs=graphs), decoding, reading)


def serving(batch: int, prompt: int, reply: int, name: str, scale: float) -> Callable[[TimeModel], float]:
    """A rate of requests of one kind."""

    def predict(model: TimeModel) -> float:
        served = model.serve(batch, context=prompt + reply, prompt=prompt, reply=reply)
        return scale * getattr(served, name)

    return predict


def decoding(batch: int, context: int) -> Callable[[TimeModel], float]:
    """Milliseconds of a decode step alone."""
    return lambda model: 1e3 * model.decode(batch, context).seconds


def single_stream(drafts: int, context: int) -> Callable[[TimeModel], float]:
    """Tokens a second of one request that nobody disturbs, with drafts."""

    def predict(model: TimeModel) -> float:
        served = model.serve(1, context=context, prompt=0, reply=1, drafts=drafts, acceptance=ACCEPTANCE)
        return served.user_rate

    return predict


BLOG = "InferenceX blog"
COMPARABLE = [
    Result(
        BLOG, f"8k in, 1k out, {batch} requests", unit, value, serving(batch, 8192, 1024, name, scale), tensor
    )
    for tensor, points in (
        (2, ((4, 13.29, 1267.5), (8, 16.76, 2008.1), (16, 21.40, 3175.6), (32, 31.34, 4346.8))),
        (4, ((32, 21.36, 3171.8), (64, 33.53, 4113.4), (128, 55.27, 5019.6), (256, 86.53, 6409.1))),
    )
    for batch, milliseconds, rate in points
    for unit, value, name, scale in (
        ("ms a token", milliseconds, "seconds_a_token", 1e3),
        ("tok/s a GPU, in and out", rate, "total_gpu_rate", 1),
    )
] + [
    Result(
        "InferenceX pull 2606",
        f"the same, {batch} requests, prefill elsewhere",
        "ms a token",
        milliseconds,
        decoding(batch, 8192 + 512),
        8,
    )
    for batch, milliseconds in ((8, 9.01), (16, 9.43), (32, 10.65))
]
COMPARABLE.append(
    Result(
        "InferenceX pull 980",
        "bfloat16, 923 in, 920 out on average, 64 requests",
        "tok/s a GPU, in and out",
        661.5,
        serving(64, 923, 920, "total_gpu_rate", 1),
        8,
        float8=False,
    )
)
# Formats, layouts or drafts that the model does not have, or that were not published: for the record only.
OTHERS = [
    Result(
        "wafer.ai, ATOM",
        "397B in MXFP4 with FP8 keys and drafts, one stream",
        "tok/s",
        310,
        single_stream(3, 11000),
        8,
    ),
    Result(
        "wafer.ai, ATOM",
        "35B, three drafts, one stream, layout not said",
        "tok/s",
        430,
        single_stream(3, 11000),
        1,
        model="35b",
    ),
]


def rows(results: list[Result]) -> list[str]:
    """Lines of a table."""
    names = "".join(f" predicted, {name} |" for name, *_ in PROGRAMS)
    lines = [f"| published by | what | GPUs | | published |{names}", "|---" * (5 + len(PROGRAMS)) + "|"]
    for one in results:
        line = f"| {one.source} | {one.what} | {one.tensor} | {one.unit} | {one.published:,.4g} "
        for _, decode, read, graphs in PROGRAMS:
            predicted = one.predict(time_model(one, decode, read, graphs))
            line += f"| {predicted:,.4g} (x {predicted / one.published:.2f}) "
        lines.append(line + "|")
    return lines


def main() -> None:
    """Prints both tables."""
    print("\n".join(rows(COMPARABLE)))
    print("\nNot comparable (predicted with FP8 weights and bfloat16 keys):\n")
    print("\n".join(rows(OTHERS)))


if __name__ == "__main__":
    main()

"""A prefill step of the 397B on 8 AMD GPUs, of any number of rows: bytes and FLOPs over the least.

The engine reads one row of a data rank at a time, and so does `compile`; this lowers the same step for more.
Nothing is run on a GPU. `python benchmarks/aot_prefill.py --rows 8 --tokens 1024` takes about 90 seconds,
after `qwen-moe-jax toolchain`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.whole_prompts import whole_prompts

from qwen_moe_jax.aot.commands import kernels_asked
from qwen_moe_jax.aot.compile import compile_deployment
from qwen_moe_jax.configs import find_config
from qwen_moe_jax.devices import find_device


def main() -> None:
    """Prints one program's report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="mi355x")
    parser.add_argument("--dtype", choices=("bfloat16", "float8"), default="bfloat16")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--attention", choices=("tensor", "data"), default="tensor")
    parser.add_argument("--kernels", default="auto", help="as of `qwen-moe-jax compile`")
    options = parser.parse_args()
    device, config = find_device(options.device), find_config("397b", dtype=options.dtype)
    deployment = whole_prompts(
        config.with_layers(config.layers[: options.layers]),
        device,
        rows=options.rows,
        tokens=options.tokens,
        expert=8,
        attention=options.attention,
        shared_expert="outside" if options.attention == "data" else "sharded",
        kernels=kernels_asked(options.kernels),
    )
    print(compile_deployment(deployment, device, model="397b", programs=("prefill",)))


if __name__ == "__main__":
    main()

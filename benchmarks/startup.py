"""Import time and time to first token, without and with compiled programs from an earlier process.

    python benchmarks/startup.py [--checkpoint checkpoints/abacus] [--repeat 3]

Every figure comes from a fresh process; the first token's seconds count from the start of the import, and
those of the README's first command from its start to its first text. Cold has no compiled programs, warm
those that a cold run left. The C++ kernels, which a machine builds once, are built before.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "Tom has 12 apples. Anna gives him 7 more. How many apples does Tom have now?"

_IMPORT = """
import time; start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""

_FIRST_TOKEN = """
import json, sys, time; start = time.perf_counter()
from qwen_moe_jax import QwenMoe
imported = time.perf_counter()
model = QwenMoe.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
pieces = model.stream([{"role": "user", "content": sys.argv[2]}])
next(pieces)
first = time.perf_counter()
for _ in pieces: pass
end = time.perf_counter()
print(json.dumps({"import": imported - start, "load": loaded - imported, "first token": first - loaded,
                  "total": first - start, "whole answer": end - start}))
"""


def _environment(cache: Path | None) -> dict[str, str]:
    return dict(os.environ) | ({"XDG_CACHE_HOME": str(cache)} if cache else {})


def _command(checkpoint: Path, prompt: str, cache: Path) -> float:
    """Seconds to the first text of `qwen-moe-jax generate`."""
    run = "import sys; from qwen_moe_jax.cli import main; sys.exit(main())"
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", run, "generate", "--model", str(checkpoint), prompt],
        env=_environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return time.perf_counter() - begin


def _python(code: str, *arguments: str, cache: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=_environment(cache),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def main() -> int:
    """Measures and prints the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[1] / "checkpoints" / "abacus"
    parser.add_argument("--checkpoint", type=Path, default=default, help="with tokenizer and chat template")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()

    print(f"medians of {args.repeat}, seconds")
    for module in ("jax", "qwen_moe_jax"):
        _python(_IMPORT.format(module=module))  # the files are in the page cache from here on
        seconds = [float(_python(_IMPORT.format(module=module))) for _ in range(args.repeat)]
        print(f"import {module:<20}{statistics.median(seconds):>7.2f}", flush=True)
    runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    commands: dict[str, list[float]] = {kind: [] for kind in runs}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        _python(_FIRST_TOKEN, str(args.checkpoint), args.prompt, cache=cache)
        for _ in range(args.repeat):
            shutil.rmtree(cache / "qwen_moe_jax" / "xla")
            for kind in runs:
                line = _python(_FIRST_TOKEN, str(args.checkpoint), args.prompt, cache=cache)
                runs[kind].append(json.loads(line))
            shutil.rmtree(cache / "qwen_moe_jax" / "xla")
            for seconds in commands.values():
                seconds.append(_command(args.checkpoint, args.prompt, cache))
    for kind, results in runs.items():
        parts = {name: statistics.median(run[name] for run in results) for name in results[0]}
        print(
            f"first token, {kind:<14}{parts['total']:>7.2f}   (import {parts['import']:.2f}, load "
            f"{parts['load']:.2f}, prefill {parts['first token']:.2f}; whole answer after "
            f"{parts['whole answer']:.2f})",
            flush=True,
        )
    for kind, seconds in commands.items():
        print(f"first text of the command, {kind:<5}{statistics.median(seconds):>7.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

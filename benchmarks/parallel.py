"""Layouts on a mesh: how exact they are, what they send, and what the shared expert costs in each mode.

    python benchmarks/parallel.py [layouts] [collectives] [work] [--all]   # default: every section

With every section the report is also written to benchmarks/results/parallel.md. Eight devices that the CPU
pretends to have: nothing here is a speed. `--all` measures every layout instead of the chosen ones.
"""

import argparse
import dataclasses
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.configs import random_config  # noqa: E402
from support.meshes import NEW_TOKENS, PROMPT_LENGTHS, factorisations, mesh_case, on_mesh, run  # noqa: E402

from qwen_moe_jax.config import ModelConfig  # noqa: E402
from qwen_moe_jax.kernels.table import Kernels  # noqa: E402
from qwen_moe_jax.model.decoder import with_parameters  # noqa: E402
from qwen_moe_jax.model.experts import choose_experts  # noqa: E402
from qwen_moe_jax.model.moe import SparseMoe, gated_mlp  # noqa: E402
from qwen_moe_jax.model.params import DtypePolicy  # noqa: E402
from qwen_moe_jax.parallel.forward import MeshForward, layout_decoder  # noqa: E402
from qwen_moe_jax.parallel.layout import DISPATCHES, SHARED_EXPERT_MODES, Layout  # noqa: E402
from qwen_moe_jax.parallel.mesh import EXPERT, make_mesh  # noqa: E402
from qwen_moe_jax.parallel.partial_sums import as_part, total  # noqa: E402

FLOAT32 = DtypePolicy(compute=jnp.dtype(jnp.float32), matrix=jnp.dtype(jnp.float32))
BFLOAT16 = DtypePolicy(compute=jnp.dtype(jnp.bfloat16), matrix=jnp.dtype(jnp.bfloat16))
Sizes = tuple[int, int, int]

MODES = SHARED_EXPERT_MODES

# An attention and a Gated DeltaNet layer, of which next to nothing is divided evenly.
SEED = 22
ODD = ((1, 3, 1), (1, 1, 3), (1, 3, 2), (1, 2, 3))
# (mesh, attention, dispatch); each is measured in all four modes
CHOSEN: tuple[tuple[Sizes, str, str], ...] = (
    *(
        (sizes, "tensor", "psum")
        for sizes in ((1, 2, 1), (1, 1, 2), (1, 2, 2), (1, 4, 1), (2, 2, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2))
    ),
    *((sizes, "tensor", "psum") for sizes in ODD),
    *((sizes, "data", "psum") for sizes in ((1, 2, 1), (1, 2, 2), (1, 4, 2))),
    *((sizes, "tensor", "all_to_all") for sizes in ((1, 2, 1), (1, 2, 2), (2, 2, 2), (1, 3, 2))),
    *((sizes, "data", "all_to_all") for sizes in ((1, 2, 2), (1, 8, 1))),
)

COUNTED: tuple[tuple[Sizes, str], ...] = (
    *((sizes, "tensor") for sizes in ((1, 2, 1), (1, 2, 2), (2, 2, 2), (1, 8, 1), (1, 4, 2))),
    ((1, 2, 2), "data"),
)
# With 20 rows no array of tokens has the shape of a weight.
ROWS, STEPS = 20, (16, 1)
# Output shapes (a tuple's, where there are several operands) and name; a "-done" is its "-start" again.
COLLECTIVE = re.compile(
    r" = (.*?) ((?:ragged-)?all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(-start)?\("
)
SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")

TOKENS = (1, 64, 4096)


def every_row() -> Iterator[tuple[Sizes, str, str]]:
    """All factorisations of 2, 4 and 8 and the odd meshes, with all that can be chosen."""
    for sizes in (*(sizes for devices in (2, 4, 8) for sizes in factorisations(devices)), *ODD):
        for attention in ("tensor", "data") if sizes[1] > 1 else ("tensor",):
            for dispatch in DISPATCHES:
                yield sizes, attention, dispatch


def table(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Markdown, with an empty line behind it."""
    lines = [names, ("---",) * len(names), *rows]
    return [*(f"| {' | '.join(map(str, cells))} |" for cells in lines), ""]


def shown(sizes: Sizes) -> str:
    """A mesh in a table."""
    return " x ".join(map(str, sizes))


def layouts(everything: bool) -> list[str]:
    """Every layout against one device and the float64 truth."""
    case = mesh_case(SEED)
    largest = max(np.abs(logits).max() for logits in case.one_device.logits)
    rows, ratios, differences, parted = [], [], [], []
    start = time.perf_counter()
    for sizes, attention, dispatch in tqdm(list(every_row()) if everything else CHOSEN, unit="row"):
        cells = []
        for mode in MODES:
            choices = {"attention": attention, "shared_expert": mode, "expert_dispatch": dispatch}
            found = run(on_mesh(SEED, *sizes, **choices), case.rows)
            pairs = zip(found.logits, case.one_device.logits, strict=True)
            differences.append(max(np.abs(ours - one).max() for ours, one in pairs) / largest)
            ratios.append(case.ratio(found))
            same = found.tokens == case.one_device.tokens
            cells.append(f"{ratios[-1]:.2f}; {differences[-1]:.1e}{'' if same else '; OTHER TOKENS'}")
            if not same:
                parted.append(f"{shown(sizes)} {attention} {dispatch} {mode}")
        rows.append((shown(sizes), attention, dispatch, *cells))
    which = "every one" if everything else "chosen to take some minutes; `--all` measures every one"
    return [
        "## Layouts against one device\n",
        f"`random_config({SEED})` in float32; mesh: data x expert x tensor. {len(PROMPT_LENGTHS)} prompts of "
        f"{min(PROMPT_LENGTHS)} to {max(PROMPT_LENGTHS)} tokens prefilled in one chunk, then {NEW_TOKENS} "
        f"greedy tokens each, all logits kept. {len(ratios)} layouts ({which}) in "
        f"{(time.perf_counter() - start) / 60:.0f} minutes, some programs from the compilation cache. "
        "Each cell: RMS error against the float64 truth over one device's own "
        f"({case.rms(case.one_device):.1e} of the largest logit); largest difference from one device, over "
        "its largest logit.\n",
        f"- Ratio {min(ratios):.2f} to {max(ratios):.2f}, median {np.median(ratios):.2f}; largest difference "
        f"{max(differences):.1e}.",
        f"- All {len(PROMPT_LENGTHS) * NEW_TOKENS} greedy tokens equal one device's in "
        f"{len(ratios) - len(parted)} of {len(ratios)} layouts"
        f"{': not in ' + '; '.join(parted) if parted else ''}.\n",
        *table(("mesh", "attention", "dispatch", *MODES), rows),
    ]


class Collectives(NamedTuple):
    """What a program sends: how many of each operation, bytes of a device's outputs, shapes gathered."""

    count: Counter[str]
    size: Counter[str]
    gathered: set[tuple[int, ...]]

    def in_words(self, embedding: "Collectives | None" = None, layers: int = 1) -> str:
        """A cell: less what the embedding sends, a layer."""
        cells = []
        for name, n in self.count.items():
            less, fewer = (embedding.size[name], embedding.count[name]) if embedding else (0, 0)
            if n - fewer:
                cells.append(f"{(n - fewer) / layers:g} {name}, {(self.size[name] - less) / layers:.0f} B")
        return "; ".join(cells) or "none"


def collectives_of(lowered: Any) -> Collectives:
    """Reads them from the optimised HLO."""
    found = Collectives(Counter(), Counter(), set())
    for outputs, name, start in COLLECTIVE.findall(lowered.compile().as_text()):
        shapes = [
            (tuple(map(int, dims.split(","))) if dims else (), int(bits or 8) // 8)
            for _, bits, dims in SHAPE.findall(outputs)
        ]
        if start and name == "all-gather":
            shapes = shapes[len(shapes) // 2 :]  # (operands, results)
        found.count[name] += 1
        found.size[name] += sum(prod(shape) * width for shape, width in shapes)
        if name == "all-gather":
            found.gathered.update(shape for shape, _ in shapes)
    return found


def structs_of(layout: Layout, policy: DtypePolicy) -> dict[str, Any]:
    """The parameters' shapes and places."""
    return {name: target.struct for name, target in layout.targets(policy).items()}


def hidden_collectives(layout: Layout, tokens: int) -> Collectives:
    """Embedding and all layers, for `ROWS` rows of `tokens` new tokens."""
    forward = MeshForward(layout, FLOAT32, Kernels("cpu"), structs_of(layout, FLOAT32))
    given = np.zeros((ROWS, tokens), np.int32), np.ones((ROWS, tokens), bool)
    cache = forward.new_cache(ROWS, 64)
    return collectives_of(jax.jit(forward.hidden).lower(forward.parameters, *given, cache))


def logits_collectives(layout: Layout) -> Collectives:
    """The logits of one position a row, put on every device."""
    forward = MeshForward(layout, FLOAT32, Kernels("cpu"), structs_of(layout, FLOAT32))
    hidden = np.zeros((ROWS, layout.config.hidden_size), np.float32)
    logits = jax.jit(lambda p, h: forward.everywhere(forward.logits(p, h)))
    return collectives_of(logits.lower(forward.parameters, hidden))


def whole_weights(layout: Layout) -> set[tuple[int, ...]]:
    """Shapes that gathering a divided parameter, along any of its axes, would put out."""
    found = set()
    for struct in structs_of(layout, FLOAT32).values():
        local = struct.sharding.shard_shape(struct.shape)
        for i, (held, whole) in enumerate(zip(local, struct.shape, strict=True)):
            for times in {*layout.mesh.shape.values(), whole // held} - {1} if held < whole else ():
                found.add((*local[:i], held * times, *local[i + 1 :]))
        found |= {struct.shape} - {local}
    return found


def collectives(everything: bool) -> list[str]:
    """What is sent a layer, counted in the compiled programs."""
    config = ModelConfig.from_dict(random_config(SEED))
    hidden = config.hidden_size
    bare = config.with_layers(())  # embedding and last norm
    cases = [
        Layout(config, make_mesh(*sizes), attention, mode, dispatch)
        for sizes, attention in COUNTED
        for dispatch in DISPATCHES
        for mode in MODES
    ]
    cases += [
        Layout(config, make_mesh(*sizes), shared_expert="outside", exact=True)
        for sizes in ((1, 2, 2), (1, 8, 1))
    ]
    ends: dict[tuple[str, str], tuple[Collectives, ...]] = {}
    # layouts that differ in the mode alone and send the same share a line
    alike: dict[tuple[str, ...], list[str]] = {}
    gathered, weights = set(), set()
    for layout in tqdm(cases, unit="layout"):
        attention = "exact" if layout.exact else layout.attention
        place = (shown(tuple(layout.mesh.shape.values())), attention)
        if place not in ends:
            empty = dataclasses.replace(layout, config=bare)
            ends[place] = (*(hidden_collectives(empty, n) for n in STEPS), logits_collectives(layout))
        whole = [hidden_collectives(layout, tokens) for tokens in STEPS]
        pairs = zip(whole, ends[place], strict=False)
        cells = (one.in_words(embedding, config.num_hidden_layers) for one, embedding in pairs)
        alike.setdefault((*place, layout.expert_dispatch, *cells), []).append(layout.shared_expert)
        shapes = {shape for one in (*whole, *ends[place]) for shape in one.gathered}
        gathered |= shapes
        weights |= shapes & whole_weights(layout)
    return [
        "## Collectives\n",
        f"Counted in the optimised HLO of `random_config({SEED})` in float32 ({config.num_hidden_layers} "
        f"layers, hidden {hidden}, {config.num_experts} experts, top-{config.num_experts_per_tok}), {ROWS} "
        f"rows, {STEPS[0]} tokens each in prefill and one in decode: the whole program less the embedding, "
        "divided by the number of layers. Bytes are those of one device's outputs; a float32 sum of all "
        f"tokens has {ROWS * STEPS[0] * hidden * 4} B in prefill and {ROWS * hidden * 4} B in decode. Sums "
        "over the same devices that XLA puts into one operation are one, with the bytes of both. XLA:CPU has "
        "no ragged all-to-all; the padded one is counted.\n",
        *table(
            ("mesh", "attention", "dispatch", "a layer, prefill", "a layer, decode", "shared expert"),
            [(*key, ", ".join(modes)) for key, modes in alike.items()],
        ),
        *table(
            ("mesh", "attention", "embedding, prefill", "embedding, decode", "logits of one position a row"),
            [(*place, *(one.in_words() for one in found)) for place, found in ends.items()],
        ),
        f"Shapes that all-gathers put out: {', '.join(map(str, sorted(gathered)))}. Those that gathering a "
        f"parameter of the layout would put out: {', '.join(map(str, sorted(weights))) or 'none'}.\n",
    ]


class Cost(NamedTuple):
    """XLA's cost analysis of one device's program: operations and bytes accessed."""

    flops: float
    size: float

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.3f}; {self.size / 1e6:.1f}"


def cost_of(function: Callable[..., Any], *given: Any) -> tuple[Cost, Cost]:
    """Of a function of `jax.ShapeDtypeStruct`s, as written and as compiled here; nothing is allocated."""
    lowered = jax.jit(function).lower(*given)
    both = lowered.cost_analysis(), lowered.compile().cost_analysis()
    written, compiled = (Cost(found["flops"], found["bytes accessed"]) for found in both)
    return written, compiled


def large_layout(ranks: int, mode: str) -> Layout:
    """One layer of the 397B's sizes."""
    inner = {"moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024}
    experts = {"num_experts": 512, "num_experts_per_tok": 10}
    sizes = {"hidden_size": 4096, "num_hidden_layers": 1, **experts, **inner}
    config = ModelConfig.from_dict({"model_type": "qwen3_5_moe_text", **sizes})
    return Layout(config, make_mesh(expert=ranks), shared_expert=mode)


def mixture_cost(layout: Layout, tokens: int, shared: bool) -> tuple[Cost, Cost]:
    """The sum of the routed parts (given), with or without the shared branch of the layout's mode."""
    mesh, mode, prefix, axes = layout.mesh, layout.shared_expert, "layers.0.mlp.", (EXPERT,)
    assert isinstance(mesh, Mesh)
    mlp = layout_decoder(layout, BFLOAT16, Kernels("cpu")).layers[0].mlp
    assert isinstance(mlp, SparseMoe)
    named = structs_of(layout, BFLOAT16).items()
    structs = {name.removeprefix(prefix): struct for name, struct in named if name.startswith(prefix)}
    specs = {name: layout.spec(prefix + name, struct.ndim) for name, struct in structs.items()}

    def on_a_rank(parameters: dict[str, jax.Array], x: jax.Array, routed: jax.Array) -> jax.Array:
        moe = with_parameters(mlp, parameters)
        part = as_part(routed, axes)
        if shared and mode in ("prescaled", "sharded"):
            part = part + moe.shared(x)
        summed = total(part, axes)
        return summed + moe.shared(x) if shared and mode == "outside" else summed

    same, divided = PartitionSpec(), PartitionSpec(EXPERT)
    mapped = jax.shard_map(on_a_rank, mesh=mesh, in_specs=(specs, same, divided), out_specs=same)
    hidden = layout.config.hidden_size
    x = jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16, sharding=NamedSharding(mesh, same))
    parts = NamedSharding(mesh, divided)
    routed = jax.ShapeDtypeStruct((mesh.size * tokens, hidden), jnp.float32, sharding=parts)
    return cost_of(mapped, structs, x, routed)


def branch_costs(layout: Layout, tokens: int) -> list[Cost]:
    """What the shared branch adds to a device's program."""
    with_branch, without = (mixture_cost(layout, tokens, shared) for shared in (True, False))
    return [Cost(a.flops - b.flops, a.size - b.size) for a, b in zip(with_branch, without, strict=True)]


def fused_costs(config: ModelConfig, ranks: int, tokens: int) -> tuple[list[Cost], str]:
    """The blocks of a rank's share of the tokens, and how many of how many rows."""
    form = choose_experts(
        Kernels("gpu"), BFLOAT16.compute, tokens, config.num_experts, config.num_experts_per_tok, ranks=ranks
    )
    block = form.keywords.get("block", 1) if isinstance(form, partial) else 1
    share = -(-tokens // ranks)
    blocks = -(-share // block)
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    shapes = ((block, hidden), (inner, hidden), (inner, hidden), (hidden, inner))
    one = cost_of(gated_mlp, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    return [Cost(blocks * cost.flops, blocks * cost.size) for cost in one], f"{blocks} of {block}"


def shared_bytes(layout: Layout) -> int:
    """Bytes of the shared expert's matrices on a device; fused, of one slot of the expert stacks."""
    found = 0
    for name, struct in structs_of(layout, BFLOAT16).items():
        local = struct.sharding.shard_shape(struct.shape)
        if ".mlp.shared_expert." in name:
            found += prod(local) * struct.dtype.itemsize
        elif layout.shared_expert == "fused" and ".mlp.experts." in name:
            found += prod(local[1:]) * struct.dtype.itemsize
    return found


def work(everything: bool) -> list[str]:
    """What the shared branch adds to a device's work."""
    written, compiled, weights, wire = [], [], [], []
    for ranks in tqdm((2, 4, 8), unit="mesh"):
        config = large_layout(ranks, "fused").config
        for tokens in TOKENS:
            costs = [branch_costs(large_layout(ranks, mode), tokens) for mode in MODES[:3]]
            fused, blocks = fused_costs(config, ranks, tokens)
            for rows, cells in zip((written, compiled), zip(*costs, fused, strict=True), strict=True):
                rows.append((ranks, tokens, *cells, blocks))
        held = (shared_bytes(large_layout(ranks, mode)) for mode in MODES)
        weights.append((ranks, *(f"{size / 1e6:.2f}" for size in held)))
        sent = (2 * (ranks - 1) / ranks * tokens * config.hidden_size * 4 for tokens in TOKENS)
        wire.append((ranks, *(f"{size / 1e6:.3f}" for size in sent)))
    names = ("EP", "tokens", *MODES, "fused: blocks of rows")
    return [
        "## Work of the shared expert\n",
        "One layer at the 397B's sizes (hidden 4096, 512 experts, top-10, both intermediates 1024), "
        "activations and matrices bfloat16, mesh 1 x EP x 1, dispatch psum, every token on every device; "
        "nothing is allocated. XLA's cost analysis of one device's program, the sum of the routed parts with "
        "the shared branch less the same without. Each cell: GFLOP; MB accessed. First of the program as "
        "written:\n",
        *table(names, written),
        "As compiled for XLA:CPU, which widens bfloat16 to float32 first and counts that as work:\n",
        *table(names, compiled),
        "`fused` has no branch of its own to compile, and the grouped product is a loop of data-dependent "
        "length, whose body XLA counts once. Its cells are the cost of one block's products (rows as "
        "`choose_experts` picks them on GPUs; one where it goes slot by slot) times the blocks that a rank's "
        "share of the tokens, 1/EP, needs; one token costs so on one rank only. A block counts its "
        "expert's weights anew. Gating, gathering and adding up rows are left out.\n",
        "MB of weights that a device holds for a layer's shared expert:\n",
        *table(("EP", *MODES), weights),
        "MB that a device sends for the layer's all-reduce, in any mode (a ring: 2 (n - 1) / n x tokens x "
        "hidden x 4 B):\n",
        *table(("EP", *(f"tokens: {tokens}" for tokens in TOKENS)), wire),
    ]


SECTIONS: dict[str, Callable[[bool], list[str]]] = {
    "layouts": layouts,
    "collectives": collectives,
    "work": work,
}


def main() -> None:
    """Measures, prints and, where nothing is left out, writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--all", action="store_true", help="every layout, in the section of that name")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "parallel.md")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    jax.config.update("jax_num_cpu_devices", 8)
    lines = [
        "# Layouts on a mesh",
        "",
        f"jax {jax.__version__}, {jax.default_backend()} (8 pretended devices). Made by "
        "`python benchmarks/parallel.py`; no figure here is a speed.",
        "",
    ]
    for name in options.sections or SECTIONS:
        lines += SECTIONS[name](options.all)
    report = "\n".join(lines)
    print(report)
    if not options.sections:
        options.output.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()

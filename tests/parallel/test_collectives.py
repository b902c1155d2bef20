"""How many collectives the compiled programs hold, a layer: counted in the optimised HLO."""

from collections import Counter
from typing import Any

import pytest
from support.collectives import collectives, programs
from support.configs import random_config
from support.meshes import on_mesh
from support.slow import some

SEED = 22  # a layer of either kind; fusable
LAYERS = random_config(SEED)["num_hidden_layers"]
CASES = [
    # sizes, choices, collectives a decoder layer
    ((1, 2, 1), {"shared_expert": "prescaled"}, {"all-reduce": 2}),
    ((1, 2, 1), {"shared_expert": "outside"}, {"all-reduce": 2}),
    ((1, 2, 2), {"shared_expert": "prescaled"}, {"all-reduce": 2}),
    ((1, 2, 2), {"shared_expert": "sharded"}, {"all-reduce": 2}),
    ((1, 2, 2), {"shared_expert": "fused"}, {"all-reduce": 2}),
    ((1, 4, 2), {"shared_expert": "sharded"}, {"all-reduce": 2}),
    ((2, 2, 2), {"shared_expert": "sharded"}, {"all-reduce": 2}),
    ((1, 1, 4), {"shared_expert": "sharded"}, {"all-reduce": 2}),
    # the stated exception: a shared expert of its own, divided over tensor, has a sum of its own
    ((1, 2, 2), {"shared_expert": "outside"}, {"all-reduce": 3}),
    # nothing but the batch is divided
    ((4, 1, 1), {"shared_expert": "prescaled"}, {}),
    # attention data parallelism: tokens are gathered for the experts and their sum scattered
    (
        (1, 2, 1),
        {"shared_expert": "sharded", "attention": "data"},
        {"all-gather": 1, "reduce-scatter": 1},
    ),
    (
        (1, 2, 2),
        {"shared_expert": "sharded", "attention": "data"},
        {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2},
    ),
    # ids with weights, tokens, outputs; then each rank's tokens for all ranks
    (
        (1, 2, 1),
        {"shared_expert": "prescaled", "expert_dispatch": "all_to_all"},
        {"all-to-all": 3, "all-gather": 1, "all-reduce": 1},
    ),
    (
        (1, 8, 1),
        {"shared_expert": "prescaled", "expert_dispatch": "all_to_all"},
        {"all-to-all": 3, "all-gather": 1, "all-reduce": 1},
    ),
    (
        (1, 2, 2),
        {"shared_expert": "fused", "expert_dispatch": "all_to_all"},
        {"all-to-all": 3, "all-gather": 1, "all-reduce": 2},
    ),
    (
        (1, 2, 2),
        {"shared_expert": "prescaled", "expert_dispatch": "all_to_all", "attention": "data"},
        {"all-to-all": 3, "all-reduce": 2},
    ),
    # exact: attention is the same on every rank; the experts' slots are summed before the rest
    ((1, 4, 1), {"exact": True}, {"all-reduce": 1}),
    ((1, 2, 2), {"exact": True}, {"all-reduce": 3}),
]


@pytest.mark.parametrize(("sizes", "choices", "a_layer"), some(CASES, lambda i: i % 6 == 0))
def test_collectives_of_a_layer(sizes: tuple[int, int, int], choices: dict[str, Any], a_layer: dict) -> None:
    model = on_mesh(SEED, *sizes, **choices)
    assert model.layout is not None
    # the embedding of a token lies on one rank
    expected = Counter({kind: LAYERS * count for kind, count in a_layer.items()})
    expected["all-reduce"] += 1 if model.layout.head_axes else 0
    for name, compiled in programs(model, batch=4).items():
        counts, gathered = collectives(compiled)
        assert counts == +expected, name
        # What is gathered are tokens and no weights: as many as there are, of their width, or with the mark
        # of a pad.
        tokens = model.sequence_logits.padded(4) * (16 if name == "prefill" else 1)
        hidden = model.config.hidden_size
        for shape in gathered:
            assert shape[0] <= -(-tokens // 8) * 8
            assert shape[1] in (hidden, hidden + 1), f"{name} gathers {shape}"


def test_the_engines_steps_add_one_gather_of_logits() -> None:
    model = on_mesh(SEED, 1, 2, 2, shared_expert="sharded")
    with model.engine(max_rows=2, memory=1 << 24) as engine:
        core = engine._core
        assert core is not None
        lowered = {}
        decode, prefill = core.steps._decode, core.steps._prefill

        def noting(name, function):
            def call(*args, **kwargs):
                lowered[name] = function.lower(*args, **kwargs)
                return function(*args, **kwargs)

            return call

        core.steps._decode, core.steps._prefill = noting("decode", decode), noting("prefill", prefill)
        try:
            engine.submit([1, 2, 3, 4], max_new_tokens=2).result()
        finally:
            core.steps._decode, core.steps._prefill = decode, prefill
    counts, gathered = collectives(lowered["decode"].compile())
    assert counts == Counter({"all-reduce": 1 + 2 * LAYERS, "all-gather": 1})
    vocab = model.layout.splits["vocab"].size  # type: ignore[union-attr]
    assert gathered == [(1, 1, vocab)]
    counts, gathered = collectives(lowered["prefill"].compile())
    # nobody looks at the hidden states of a prompt, so the last layer's experts are left out
    assert counts == Counter({"all-reduce": 2 * LAYERS - (1 if LAYERS else 0)})
    assert gathered == []


def test_the_count_is_of_something() -> None:
    """The pattern finds collectives in HLO, also asynchronous ones and those of several operands."""
    text = """
      %a = f32[4,8]{1,0} all-reduce(f32[4,8]{1,0} %x), replica_groups={{0,1}}
      %b = (f32[2]{0}, f32[4]{0}) all-gather-start(f32[1]{0} %y), dimensions={0}
      %c = (f32[1,8]{1,0}, f32[1,8]{1,0}) all-to-all(f32[1,8]{1,0} %z, f32[1,8]{1,0} %w)
      %d = (f32[1], f32[1], f32[1], f32[1], f32[1], /*index=5*/f32[1]) all-to-all(f32[1] %v)
    """

    class Compiled:
        def as_text(self) -> str:
            return text

    counts, gathered = collectives(Compiled())
    assert counts == Counter({"all-reduce": 1, "all-gather": 1, "all-to-all": 2})
    assert gathered == [(2,), (4,)]

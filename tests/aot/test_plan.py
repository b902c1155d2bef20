"""Plans: what fits is what fits in memory, and the order is that of the bounds."""

import dataclasses
import json
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import pytest
from support.configs import random_config

from qwen_moe_jax.aot.minimum import collective_bytes, least_work, roofline
from qwen_moe_jax.aot.plan import Option, Plan, plan
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.configs import find_config
from qwen_moe_jax.devices import GIB, Device, find_device
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.memory import USABLE, device_memory
from qwen_moe_jax.parallel.mesh import abstract_mesh
from qwen_moe_jax.schemes.fp8 import FP8
from qwen_moe_jax.schemes.presets import of_dtype

# Four layers of the 397B, so that a plan takes a tenth of a second: 29 GB in bfloat16.
SMALL = find_config("397b").with_layers(find_config("397b").layers[:4])
EVERYTHING = 1000  # more than there are layouts


def device(gib: float) -> Device:
    return dataclasses.replace(find_device("mi300x"), memory=int(gib * GIB))


def everything(config: ModelConfig = SMALL, gib: float = 16.0, count: int = 8, **given: Any) -> Plan:
    given = {"batch": 64, "context": 8192} | given
    return plan(config, device(gib), count, top=EVERYTHING, **given)


def sizes(option: Option) -> tuple[int, int, int]:
    return option.data, option.expert, option.tensor


def memory(option: Option, config: ModelConfig, on: Device, context: int) -> Any:
    choices = {name: getattr(option, name) for name in ("attention", "expert_dispatch", "shared_expert")}
    return device_memory(config, sizes(option), context, device=on, **choices)


@pytest.mark.parametrize(("dtype", "held"), [("bfloat16", "bfloat16"), ("float8", "float8 and bfloat16")])
def test_what_fits_and_the_largest_batch_are_those_of_the_memory_report(dtype: str, held: str) -> None:
    found = everything(dtype=dtype)
    config = dataclasses.replace(SMALL, quantization=of_dtype(dtype, experts=SMALL.num_experts))
    assert found.fitting
    assert found.too_large
    for option in (*found.fitting, *found.too_large):
        report = memory(option, config, device(16.0), 8192)
        assert option.largest_batch == report.largest_batch(held, 8192)
        assert option.weights == sum(report.holdings[held].weights.values())
        assert option.fits == (option.largest_batch >= 64)


def test_a_layout_is_called_fitting_up_to_its_largest_batch_and_not_beyond() -> None:
    found = everything()
    bounds = {(sizes(o), o.attention, o.expert_dispatch): o.largest_batch for o in found.fitting}
    largest = max(bounds.values())
    fits = everything(batch=largest).fitting
    assert {(sizes(o), o.attention, o.expert_dispatch) for o in fits} == {
        key for key, batch in bounds.items() if batch == largest
    }
    assert everything(batch=largest + 1).fitting == ()


def test_what_is_too_large_says_by_how_much() -> None:
    """With as much memory more, it fits; with a little less than that, it does not."""
    missing = everything(gib=4.0, count=2)
    assert missing.fitting == ()
    over = min(option.over for option in missing.too_large)
    enough = 4.0 + (over + 1) / USABLE / GIB
    nearest = {sizes(option) for option in missing.too_large if option.over == over}
    assert {sizes(option) for option in everything(gib=enough, count=2).fitting} == nearest
    assert everything(gib=enough - 0.001, count=2).fitting == ()


def test_the_order_is_that_of_the_bounds() -> None:
    found = everything(gib=20.0)
    assert len(found.fitting) > 10
    rates = [option.roofline.tokens_per_second for option in found.fitting]
    assert rates == sorted(rates, reverse=True)
    assert [option.largest_batch for option in found.too_large] == sorted(
        (option.largest_batch for option in found.too_large), reverse=True
    )
    for before, after in pairwise(found.too_large):
        assert before.largest_batch > after.largest_batch or before.over <= after.over


def test_top_is_the_beginning_of_the_whole_list() -> None:
    whole, best = everything(), plan(SMALL, device(16.0), 8, batch=64, context=8192, top=3)
    assert best.fitting == whole.fitting[:3]
    assert best.too_large == whole.too_large[:3]
    assert best.considered == whole.considered == len(whole.fitting) + len(whole.too_large)
    assert best.fit == len(whole.fitting)


def test_an_option_is_the_roofline_of_its_layout() -> None:
    bfloat16 = jnp.dtype(jnp.bfloat16)
    policy = DtypePolicy(compute=bfloat16, matrix=bfloat16)
    for option in everything(count=4).fitting:
        layout = Layout(
            SMALL,
            abstract_mesh(*sizes(option)),
            option.attention,
            option.shared_expert,
            option.expert_dispatch,
            ragged=True,
        )
        work = least_work(layout, policy, batch=64, tokens=1, context=8191)
        collectives = collective_bytes(layout, policy, batch=64, tokens=1)
        assert option.roofline == roofline(work, device(16.0), collectives=collectives)
        assert option.roofline.tokens_per_second <= 64 * device(16.0).bandwidth / work.total_bytes


def test_all_layouts_use_all_devices_once_each() -> None:
    found = everything(count=8)
    options = [*found.fitting, *found.too_large]
    assert all(option.data * option.expert * option.tensor == 8 for option in options)
    keys = [(sizes(option), option.attention, option.expert_dispatch) for option in options]
    assert len(set(keys)) == len(keys)
    # ten ways to write 8 as a product of three; with an expert axis, four choices instead of one
    assert len({sizes(option) for option in options}) == 10
    assert len(options) == 4 + 6 * 4


def test_no_rank_is_left_without_experts_or_a_part_of_each() -> None:
    small = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = ModelConfig.from_dict(random_config(22) | small)
    axes = {sizes(option) for option in everything(config, count=8, context=16).fitting}
    assert max(expert for _, expert, _ in axes) == 4
    assert max(tensor for _, _, tensor in axes) == 8
    # 16 devices: no axis of 16 but data's
    axes = {sizes(option) for option in everything(config, count=16, context=16).fitting}
    assert (16, 1, 1) in axes
    assert not {(1, 16, 1), (1, 1, 16), (1, 8, 2)} & axes
    # 3 ranks of 2 experts each: the last would have none
    axes = {sizes(option) for option in everything(config, count=3, context=16).fitting}
    assert axes == {(3, 1, 1), (1, 1, 3)}


def test_one_device_has_one_layout() -> None:
    (option,) = everything(gib=64.0, count=1).fitting
    assert sizes(option) == (1, 1, 1)
    assert option.roofline.exchange_seconds == 0


def test_where_nothing_fits_the_plan_says_so_and_what_would() -> None:
    weights = everything(gib=1.0)
    assert weights.fitting == ()
    assert all(option.largest_batch == 0 and option.over > 0 for option in weights.too_large)
    assert "0 of 28 layouts fit" in str(weights)
    assert str(weights).endswith("too large for every layout: give more devices, or float8 or mxfp4.")
    assert str(everything(gib=1.0, dtype="float8")).endswith("give more devices.")
    batch = everything(batch=100_000)
    assert batch.too_large[0].largest_batch > 0
    assert str(batch).endswith("give a smaller one, or more devices.")


def test_the_dtype_is_the_configurations_own_unless_one_is_given() -> None:
    float8 = dataclasses.replace(SMALL, quantization=FP8)
    assert everything(SMALL) == everything(float8, dtype="bfloat16")
    assert everything(float8) == everything(SMALL, dtype="float8")
    assert everything(float8).dtype == "float8"
    # the same number of values, in fewer bytes
    assert everything(float8).parameters == everything(SMALL).parameters
    assert everything(float8).fit > everything(SMALL).fit


def test_a_plan_is_json_with_all_that_the_table_shows() -> None:
    found = everything()
    said = json.loads(found.to_json())
    assert said == found.to_dict()
    assert said["device"] == "AMD Instinct MI300X"
    for option, written in zip(found.fitting, said["fitting"], strict=True):
        assert written["fits"]
        assert written["largest_batch"] == option.largest_batch
        assert written["roofline"]["tokens_per_second"] == option.roofline.tokens_per_second
    assert not any(written["fits"] for written in said["too_large"])


def test_the_table_has_a_line_an_option_in_order() -> None:
    found = everything()
    fits, large = str(found).split("do not fit:")
    ends = [line.split()[-2:] for line in fits.splitlines() if line.strip()[:1].isdigit()]
    # the first line begins with the number of parameters
    assert ends[1:] == [
        [f"{option.roofline.tokens_per_second:,.0f}", f"{option.collectives}"] for option in found.fitting
    ]
    assert len([line for line in large.splitlines() if line.strip()[:1].isdigit()]) == len(found.too_large)
    assert "28 layouts fit" in fits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "count is 0; expected a positive integer"),
        ({"count": -8}, "count is -8"),
        ({"count": 2.5}, r"count is 2\.5"),
        ({"batch": 0}, "batch is 0"),
        ({"context": 0}, "context is 0"),
        ({"context": 262_145}, "context is 262145; expected at most the model's 262144 tokens"),
        ({"dtype": "int3"}, "dtype is 'int3'; expected one of 'bfloat16', 'float8', 'int8'"),
        ({"shared_expert": "twice"}, "shared_expert is 'twice'"),
    ],
)
def test_what_cannot_be_planned_for_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        everything(**given)


def test_the_397b_is_served_by_eight_mi355x_in_either_dtype_and_by_two_not_in_bfloat16() -> None:
    """794 GB in bfloat16, 404 GB in float8, and 288 GiB a device."""
    config = find_config("397b")
    for count, dtype, fits in ((4, "bfloat16", True), (2, "bfloat16", False), (2, "float8", True)):
        found = plan(config, find_device("mi355x"), count, batch=4, context=4096, dtype=dtype, top=1)
        assert bool(found.fitting) == fits


def test_drafts_are_planned_with_the_bytes_of_their_layer_and_by_how_often_they_hold() -> None:
    plain, drafting = everything(), everything(draft_tokens=3)
    best = drafting.fitting[0]
    same = next(o for o in plain.fitting if sizes(o) == sizes(best) and o.attention == best.attention)
    report = memory(best, SMALL, device(16.0), 8192).holdings["bfloat16"]
    assert sum(report.weights.values()) == same.weights < best.weights
    assert [one.drafts for one in drafting.drafts] == [1, 2, 3]
    assert not plain.drafts
    for one in drafting.drafts:
        seconds = one.roofline.seconds
        assert seconds > same.roofline.seconds
        for rate, found in one.tokens_per_second.items():
            # one by one: the first draft holds, and then the second, ...
            wanted = 1 + sum(rate ** (i + 1) for i in range(one.drafts))
            assert found == pytest.approx(64 * wanted / seconds)
    text = str(drafting)
    assert "how often a draft holds" in text
    assert json.loads(drafting.to_json())["drafts"][2]["drafts"] == 3
    with pytest.raises(InputError, match="draft_tokens is 9; expected 0 to 8"):
        everything(draft_tokens=9)

"""The dtype that sums over ranks travel in."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import random_config, random_ids
from support.meshes import mesh_case

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import abstract_mesh

SEED = 22


def layout(**choices):
    return Layout(
        ModelConfig.from_dict(random_config(SEED)), abstract_mesh(1, 2, 2), "tensor", "outside", **choices
    )


def test_sums_travel_in_the_compute_dtype_unless_exact_or_asked():
    for choices, wanted in (
        ({}, "bfloat16"),
        ({"sums": "compute"}, "bfloat16"),
        ({"sums": "float32"}, "float32"),
        ({"exact": True}, "float32"),
    ):
        assert layout(**choices).sum_dtype(jnp.bfloat16) == wanted, choices
        assert layout(**choices).sum_dtype(jnp.float32) == "float32"
    with pytest.raises(InputError, match="sums='compute', which rounds them"):
        layout(exact=True, sums="compute")
    with pytest.raises(InputError, match="sums is 'narrow'; expected 'auto', 'compute', 'float32'"):
        layout(sums="narrow")


_SUMMED = re.compile(r'"stablehlo\.(?:all_reduce|reduce_scatter)".*?\}\) : \(tensor<([\dx]+)x(\w+)>\)', re.S)
_SENT = re.compile(r'"stablehlo\.all_to_all"[^\n]*? : \(tensor<([\dx]+)x(\w+)>\)')

CHOICES = [
    ((1, 2, 2), {"shared_expert": "sharded"}),
    ((1, 4, 1), {"shared_expert": "outside", "expert_dispatch": "all_to_all"}),
    ((1, 2, 2), {"shared_expert": "prescaled", "attention": "data"}),
]


@pytest.mark.parametrize(("sizes", "choices"), CHOICES)
def test_a_program_exchanges_hidden_states_in_that_dtype_alone(sizes, choices):
    """In what is handed to the compiler; XLA:CPU itself adds up bfloat16 in float32."""
    case = mesh_case(SEED)
    for sums, other in (("compute", "f32"), ("float32", "bf16")):
        model = QwenMoe.from_pretrained(
            case.folder, dtype=jnp.bfloat16, mesh=make_mesh(*sizes), sums=sums, **choices
        )
        forward = model.sequence_logits.forward
        batch = model.sequence_logits.padded(4)
        arrays = np.zeros((batch, 16), np.int32), np.ones((batch, 16), bool)
        cache = forward.new_cache(batch, 64)
        text = jax.jit(forward.hidden).lower(forward.parameters, *arrays, cache).as_text()
        hidden = model.config.hidden_size
        sums_of = [d for shape, d in _SUMMED.findall(text) if int(shape.split("x")[-1]) == hidden]
        assert sums_of
        assert other not in sums_of, sums
        if choices.get("expert_dispatch") == "all_to_all":
            sent = {d for shape, d in _SENT.findall(text) if int(shape.split("x")[-1]) == hidden}
            # tokens go in bfloat16 either way, outputs come as sums do
            assert sent == ({"bf16"} if sums == "compute" else {"bf16", "f32"})


def test_sums_in_bfloat16_are_no_further_from_the_truth_than_the_model_is():
    """The mean divergence of a mesh with rounded sums against one device's own, both in bfloat16; either has
    the roundings of activations, beside which those of the sums hardly show."""
    case = mesh_case(SEED)
    ids = np.stack([random_ids(random_config(SEED), 48, draw) for draw in range(8)])

    def logs(dtype, **options):
        model = QwenMoe.from_pretrained(case.folder, dtype=dtype, **options)
        return np.asarray(jax.nn.log_softmax(np.asarray(model.logits(ids), np.float64), axis=-1))

    truth = logs(jnp.float32)

    def divergence(found):
        return (np.exp(truth) * (truth - found)).sum(-1).mean()

    mesh = {"mesh": make_mesh(1, 4, 2), "shared_expert": "sharded"}
    alone = divergence(logs(jnp.bfloat16))
    rounded = divergence(logs(jnp.bfloat16, sums="compute", **mesh))
    wide = divergence(logs(jnp.bfloat16, sums="float32", **mesh))
    assert rounded != wide  # the option does something
    assert rounded < 1.5 * max(alone, wide)

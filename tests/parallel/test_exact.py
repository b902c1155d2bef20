"""exact=True: logits that are equal bit by bit for every number of ranks the experts are divided among."""

import numpy as np
import pytest
from support.configs import random_config, random_ids
from support.meshes import mesh_case

from qwen_moe_jax import QwenMoe, make_mesh

# Of several chunks, one of them with a tail, so that both forms of the expert products run.
LENGTH = 37


def assert_equal_bits(seed: int, dtype: str, tensor: int, sizes: tuple[int, ...]) -> None:
    ids = np.stack([random_ids(random_config(seed), LENGTH, i) for i in range(3)])
    found = []
    for expert in sizes:
        mesh = make_mesh(expert=expert, tensor=tensor)
        model = QwenMoe.from_pretrained(mesh_case(seed).folder, dtype=dtype, mesh=mesh, exact=True)
        out = model.generate(ids, max_new_tokens=4, return_logprobs=True)
        found.append((np.asarray(model.logits(ids)), out.sequences, out.logprobs))
    for logits, sequences, logprobs in found[1:]:
        np.testing.assert_array_equal(logits.view(np.uint32), found[0][0].view(np.uint32))
        assert sequences == found[0][1]
        assert logprobs == found[0][2], "decoding, token by token"


@pytest.mark.slow
def test_one_and_four_ranks_give_the_same_bits() -> None:
    assert_equal_bits(22, "float32", 1, (1, 4))


@pytest.mark.slow
def test_so_do_two_and_eight() -> None:
    assert_equal_bits(22, "float32", 1, (1, 2, 8))


@pytest.mark.slow
def test_also_in_bfloat16_and_with_tensor_parallelism() -> None:
    assert_equal_bits(22, "bfloat16", 2, (1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [1, 4, 14])
def test_random_configurations_give_the_same_bits(seed: int, dtype: str, tensor: int) -> None:
    assert_equal_bits(seed, dtype, tensor, (1, 2, 4, 8) if tensor == 1 else (1, 2, 3, 4))


def test_the_property_is_not_a_matter_of_course() -> None:
    """Without exact, some bits differ between numbers of ranks: the test above can fail."""
    ids = random_ids(random_config(22), LENGTH, 0)[None]
    folder = mesh_case(22).folder
    one, other = (
        np.asarray(
            QwenMoe.from_pretrained(
                folder, dtype="float32", mesh=make_mesh(expert=expert), shared_expert="outside"
            ).logits(ids)
        )
        for expert in (1, 4)
    )
    assert (one != other).any()

"""What the tests write for gptqmodel, auto-round, autoawq and amd-quark is what those write, byte by byte."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.codes import KINDS, stored_tensors

# made by pack_by_libraries.py
PACKED = load_file(Path(__file__).with_name("packed_by_libraries.safetensors"))
NAMES = sorted({key.partition(".")[0] for key in PACKED if key.endswith(".product")})


def test_every_library_is_there():
    assert {KINDS[name].method for name in NAMES} == {"gptq", "auto-round", "awq", "quark"}


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_the_matrix_they_mean_are_the_library_s(name):
    tensors, product = stored_tensors(PACKED["weight"], KINDS[name])
    theirs = {
        key.removeprefix(f"{name}."): value for key, value in PACKED.items() if key.startswith(f"{name}.")
    }
    meant = theirs.pop("product")
    assert set(theirs) <= set(tensors)
    for key, value in theirs.items():
        assert tensors[key].dtype == value.dtype, key
        assert torch.equal(tensors[key], value), key
    # a code times a scale has more bits than the library's dtype, to which it rounds
    assert torch.equal(product.to(meant.dtype), meant)
    assert meant.abs().max() > 1

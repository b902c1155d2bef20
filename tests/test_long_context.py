"""A prompt of 20,000 tokens: the reference's logits, and the tokens that follow."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.configs import random_config, random_ids
from support.parity import LARGEST_DIFFERENCE
from support.reference import build_reference, reference_greedy, save_reference

from qwen_moe_jax import QwenMoe

TOKENS, LAST, NEW = 20_000, 200, 8
# Both sides are float32 and so far from the truth at most (`support/parity.py`), here after a hundred times
# as many steps of a state that forgets.
TOLERANCE = 2 * LARGEST_DIFFERENCE


# the released pattern of layers; and one with YaRN, which stretches 256 positions to all of these
@pytest.mark.parametrize("seed", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_the_end_of_a_long_prompt_is_the_references(seed: int, tmp_path: Path) -> None:
    config = random_config(seed) | {"max_position_embeddings": 32_768}
    reference = build_reference(config, seed)
    model = QwenMoe.from_pretrained(save_reference(reference, tmp_path), dtype="float32")
    ids = random_ids(config, TOKENS, seed)
    with torch.no_grad():
        theirs = reference(torch.as_tensor(ids)[None], use_cache=False, logits_to_keep=LAST).logits[0].numpy()
    out = model.generate(ids[None], max_new_tokens=NEW, eos_token_id=[])
    assert out.sequences[0] == reference_greedy(reference, ids, NEW)
    ours = np.asarray(model.logits(ids[None]))[0, -LAST:]
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= TOLERANCE

"""Checkpoints of the reference, to be damaged."""

import pytest
from checkpoint_cases import UNTIED_SEED, reference, shards_of


@pytest.fixture
def folder(tmp_path):
    """A one-file float32 checkpoint to be damaged."""
    reference(UNTIED_SEED).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """The same in several files."""
    reference(UNTIED_SEED).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(shards_of(tmp_path)) >= 3
    return tmp_path

"""What tests of labelled data start from."""

from pathlib import Path

import pytest
from small_labelled import write_tokenizer


@pytest.fixture
def base(world, tmp_path):
    """A folder that all ranks share, with a tokenizer."""
    base = Path(world.comm.bcast(str(tmp_path)))
    if world.is_root:
        write_tokenizer(base / "tokenizer")
    world.comm.Barrier()
    return base

"""Compiled blocks compute what they are compiled from, whoever else wraps them. Skipped where there is no compiler."""

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import models
import pytest
import torch
from test_layouts import HOSTS, SIZE, built, check_weights, largest_difference, parallel, train
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from hpcllm.errors import UsageError
from hpcllm.parallel import compiled
from hpcllm.parallel import mesh as meshes
from hpcllm.parallel.apply import apply

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile has no C++ compiler here"
)
pytestmark = pytest.mark.mpi(max_size=2)
LAYOUTS = [
    how
    for how in (
        {},
        {"sharding": "optimizer"},
        {"sharding": "full"},
        {"pipeline": 2},
        {"pipeline": 2, "pipeline_schedule": "interleaved", "stages_per_rank": 2},
        {"context": 2},
    )
    if SIZE % (how.get("context", 1) * how.get("pipeline", 1)) == 0
]


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    counters.clear()


def place(world, model, again=False, **changes):
    section = parallel(**changes)
    return apply(model, built(meshes.layout(section, HOSTS), world), section, again, compile_blocks=True)


def graphs():
    return counters["stats"]["unique_graphs"]


@needs_compiler
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("how", LAYOUTS, ids=str)
def test_compiled_blocks_train_to_the_same_weights_under_their_names(world, how, again):
    layers = 4 if "pipeline" in how else 2
    expected, weights = models.train_alone("gpt2", layers=layers)
    placed = place(world, models.build("gpt2", layers=layers), again, **how)
    assert largest_difference(train(placed), expected) < 1e-5
    assert list(placed.pieces) == list(weights)
    check_weights(placed, weights)
    assert graphs() == 1 and not counters["graph_break"]  # for all blocks, whole


@needs_compiler
def test_what_is_computed_again_drops_the_same_activations(world):
    told = [train(place(world, models.build("bert", dropout=0.2), again)) for again in (False, True)]
    assert largest_difference(told[1], told[0]) < 1e-5
    assert 1e-3 < largest_difference(told[0], models.train_alone("bert")[0]) < 0.5


@needs_compiler
def test_batches_of_any_width_are_evaluated_by_a_few_graphs(world):
    whole, placed = models.build("bert").eval(), place(world, models.build("bert"))
    placed.train(False)
    ids = torch.randint(0, models.WORDS, (9, models.LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for width in (4, 4, 3, 4, 1, 7, 2, 9, 1, 5):
            ours, theirs = (model(input_ids=ids[:width]).logits for model in (placed.model, whole))
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert graphs() == 3  # for the first width, for one row, for any


@torch._inductor.config.patch(cpp_cache_precompile_headers=True)
def test_what_is_unpickled_lies_where_nobody_else_can_have_put_it(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # what there was comes back at the end
    default, own = Path(default_cache_dir()), tmp_path / f"hpcllm-inductor-{os.getuid()}"

    def chosen(before=None):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if before:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(before))
        compiled._keep_apart()
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert stat.S_ISDIR(folder.lstat().st_mode) and stat.S_IMODE(folder.lstat().st_mode) == 0o700
        compiled._keep_apart()  # as is done in more than one place
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == folder
        return folder

    assert chosen() == chosen() == chosen(before=default) == own
    own.chmod(0o777)
    assert chosen() != own
    own.rmdir()
    own.symlink_to(tmp_path)
    assert chosen() != own
    own.unlink()
    own.touch()
    assert chosen() != own
    assert torch._inductor.config.cpp_cache_precompile_headers
    default.chmod(0o777)
    assert chosen(before=default) not in (own, default)
    assert not torch._inductor.config.cpp_cache_precompile_headers  # which lie there in any case
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    compiled._keep_apart()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


@needs_compiler
def test_what_torch_names_by_itself_is_not_taken_for_the_users_wish(world):
    """Importing torch's compiler sets the variable."""
    script = "import torch._dynamo\nfrom hpcllm.parallel import compiled\nimport os, torch\n"
    script += "compiled.require(torch.device('cpu'))\nprint(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert Path(ran.stdout.strip()).name.startswith("hpcllm-inductor-"), ran.stdout + ran.stderr


def test_without_a_compiler_there_is_a_sentence(world):
    nothing = torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")})
    with nothing, pytest.raises(UsageError, match=r"torch.compile does not work on this host \(.*/nowhere/g\+\+.*\)"):
        compiled.require(torch.device("cpu"))
    with contextlib.nullcontext() if shutil.which(os.environ.get("CXX", "g++")) else pytest.raises(UsageError):
        compiled.require(torch.device("cpu"))

"""The scripts in examples/: two added lines carry a script of one process or torchrun over MPI, with the same training.

The reference of each is the script without these two lines, in one process, over Gloo where it asks for a process
group. All four run one after another in each job, since importing transformers takes longer than all they do.
"""

import json
import re
import subprocess
import sys

import pytest
from launching import ROOT, clean_environment

# Accelerate stands before the Trainer, whose state it would find; the Trainer makes its own.
NAMES = ("ddp", "fsdp2", "accelerate_loop", "trainer")
STEPS = 6


def losses(text):
    """The losses that the examples printed, in order: one list of STEPS for each."""
    found = [float(loss) for loss in re.findall(r"\bloss'?:? '?(\d+\.\d+)", text)]
    assert len(found) == STEPS * len(NAMES), text
    return {name: found[STEPS * i : STEPS * (i + 1)] for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def unmodified(tmp_path_factory):
    """(folder of models, losses) of the examples without their added lines, in one process."""
    folder = tmp_path_factory.mktemp("unmodified")
    scripts = []
    for name in NAMES:
        lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
        kept = [line for line in lines if "# added" not in line]
        added = [line.split("  #")[0] for line in lines if line not in kept]
        assert added == ["import hpcllm.mpi", "hpcllm.mpi.init()"]
        assert not any("hpcllm" in line for line in kept)
        scripts.append(folder / f"{name}.py")
        scripts[-1].write_text("\n".join(kept))
    # What torchrun sets for one process; port 0 is any that is free.
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    job = subprocess.run(
        [sys.executable, ROOT / "tests" / "run_example.py", folder, *scripts],
        env=clean_environment(**torchrun, ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert job.returncode == 0, job.stderr
    assert '"backend": "gloo", "communication_s": 0.0' in job.stdout
    return folder, losses(job.stdout)


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_added_lines_train_the_same_model_over_mpi(ranks, unmodified, mpirun, tmp_path):
    from safetensors.torch import load_file
    from torch.testing import assert_close

    reference, reference_losses = unmodified
    scripts = [ROOT / "examples" / f"{name}.py" for name in NAMES]
    job = mpirun(ranks, [ROOT / "tests" / "run_example.py", tmp_path, *scripts], timeout=240)
    assert job.returncode == 0, job.stderr
    told = [json.loads(line) for line in re.findall(r"^\{\"rank.*\}", job.stdout, re.MULTILINE)]
    assert sorted(each["rank"] for each in told) == list(range(ranks))
    for each in told:
        assert (each["size"], each["backend"]) == (ranks, "mpi4py")
        assert each["communication_s"] > 0
    ours = losses(job.stdout)
    for name in NAMES:
        assert ours[name] == pytest.approx(reference_losses[name], rel=1e-3), name  # the Trainer prints four digits
        assert ours[name][-1] < ours[name][0] - 1
        weights, expected = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, reference))
        assert weights.keys() == expected.keys()
        for tensor in expected:
            assert_close(weights[tensor], expected[tensor], rtol=1e-4, atol=1e-5, msg=f"{name}: {tensor}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_variables_that_accelerate_reads(device):
    import torch

    from hpcllm.mpi import World, world

    here = World(
        comm=None,
        rank=3,
        size=4,
        host="n2",
        hosts=("n1", "n2"),
        local_rank=1,
        local_size=2,
        launcher="srun",
        library="",
        library_path="",
    )
    assert world._environment(here, torch.device(device)) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}),
    }

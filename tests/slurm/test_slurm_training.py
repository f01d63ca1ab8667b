"""Claims about the shipped job scripts, from `module load hpcllm` to a trained model, on 2 nodes x 2 ranks."""

import json
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")
SMALL = (
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "train.sequence_length=64",
    "train.learning_rate=3e-3",
    "train.warmup_steps=4",
    "train.eval_every_steps=0",
    "checkpoint.every_steps=10",
)

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def project(cluster, module_load, tmp_path_factory):
    """A user's folder in which `sbatch slurm/prepare.sbatch`, without any option, has run."""
    folder = tmp_path_factory.mktemp("user") / "my project"
    folder.mkdir()
    number = cluster.submit(ROOT / "slurm/prepare.sbatch", cwd=folder, before=module_load)
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job["log"]
    assert (folder / f"prepare-{number}.out").read_text() == job["log"]
    return folder


def records(run):
    """metrics.jsonl of a run: the training records, in the order in which they were written."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if "loss" in record]


def test_prepare_writes_the_folders_that_the_run_files_name(project):
    for name in ("train/manifest.json", "validation/manifest.json", "tokenizer/tokenizer.json"):
        assert (project / "corpus/prepared" / name).is_file()


def test_bert_trains_on_two_nodes_with_two_ranks_each(cluster, module_load, project):
    script = ROOT / "slurm/train_bert.sbatch"
    number = cluster.submit(*TWO_BY_TWO, script, *SMALL, "train.max_steps=30", cwd=project, before=module_load)
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job["log"]
    assert "4 ranks on 2 hosts (n1, n2), started by srun, Open MPI" in job["log"]
    assert "BertForMaskedLM" in job["log"] and "step 30/30 loss=" in job["log"]
    assert (project / f"train_bert-{number}.out").read_text() == job["log"]

    run = project / "runs/bert"
    steps = records(run)
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == 30 and 0 < results["eval_loss"] < steps[0]["loss"] - 1
    assert (run / "checkpoint-30/.complete").is_file() and (run / "checkpoint-30/model.safetensors").is_file()

    # Submitted again with a later end, the same command goes on where it stopped.
    number = cluster.submit(*TWO_BY_TWO, script, *SMALL, "train.max_steps=32", cwd=project, before=module_load)
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job["log"]
    assert "continuing from step 30" in job["log"]
    assert [record["step"] for record in records(run)] == list(range(1, 33))


def test_gpt_trains_from_the_same_shards(cluster, module_load, project):
    number = cluster.submit(
        *TWO_BY_TWO, ROOT / "slurm/train_gpt.sbatch", *SMALL, "train.max_steps=20", cwd=project, before=module_load
    )
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job["log"]
    steps = records(project / "runs/gpt")
    assert len(steps) == 20 and steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert "GPT2LMHeadModel" in job["log"]


def test_missing_data_fails_the_job_with_66_and_names_the_folder(cluster, module_load, job_folder):
    number = cluster.submit(*TWO_BY_TWO, ROOT / "slurm/train_bert.sbatch", cwd=job_folder, before=module_load)
    job = cluster.wait(number, timeout_s=60)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "66:0"), job["log"]
    assert job["log"].count("corpus/prepared") == 1


def test_a_job_goes_on_from_its_last_checkpoint_on_other_nodes_after_a_node_has_died(cluster, module_load, project):
    run = project / "runs/death"
    settings = (*SMALL, "train.max_steps=60", f"run.output_dir={run}", "checkpoint.every_steps=5")
    number = cluster.submit(*TWO_BY_TWO, ROOT / "slurm/train_bert.sbatch", *settings, cwd=project, before=module_load)
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoint-*/.complete")):
        assert time.monotonic() < deadline, cluster.job(number)["log"]
        time.sleep(0.1)
    cluster.control("kill", "n2", cluster.folder)
    cluster.wait(number, timeout_s=60, until={"PENDING"})  # requeued by Slurm, which would start it after two minutes
    cluster.login(f"scontrol update jobid={number} starttime=now")
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), job["log"]
    assert ", start 1: srun" in job["log"] and ", start 2: srun" in job["log"]
    assert "4 ranks on 2 hosts (n1, n3)" in job["log"] and "continuing from step" in job["log"]
    lives = {life: [r["step"] for r in records(run) if r["restart"] == life] for life in (0, 1)}
    assert lives[0][0] == 1 and lives[1][-1] == 60
    assert 5 < lives[1][0] <= lives[0][-1] + 1

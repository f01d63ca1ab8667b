"""Claims about the shipped job scripts, from `module load hpcllm` to a trained model, on 2 nodes x 2 ranks.

HPCLLM_TEST_LIMIT=2x2: the job whose time is up has 2 minutes and is queued again twice; 1x1 by default.
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from benchmarks import jobs

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


# What the log calls a layout: (options of sbatch, settings). The last is what the files say, on as many ranks.
LAYOUTS = {
    "data 4": (TWO_BY_TWO, ("parallel.pipeline=1", "parallel.tensor=1")),
    "pipeline 2 x tensor 2": (TWO_BY_TWO, ()),
    "data 2 x pipeline 2, sharding full over 2 ranks": (TWO_BY_TWO, ("parallel.tensor=1", "parallel.sharding=full")),
    "data 2 x pipeline 2 x tensor 2": ((), ()),
}
CROSSES_HOSTS = {"data 4": "data", "pipeline 2 x tensor 2": "pipeline"}


@pytest.fixture(scope="module")
def layouts(cluster, module_load, project):
    """Runs of train_gpt_3d.sbatch: a function of a layout, the last step and a folder, which runs each but once."""
    done = {}

    def run(layout, steps=6, folder=None):
        folder = folder or project / "runs" / layout
        if (folder, steps) not in done:
            options, settings = LAYOUTS[layout]
            settings += (*SMALL, "train.micro_batch_size=2", "train.lr_scheduler_type=constant")
            settings += (f"train.max_steps={steps}", f"run.output_dir={folder}")
            script = ROOT / "slurm/train_gpt_3d.sbatch"
            number = cluster.submit(*options, script, *settings, cwd=project, before=module_load)
            job = cluster.wait(number, timeout_s=240)
            assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job["log"]
            done[folder, steps] = folder, job["log"]
        return done[folder, steps]

    return run


def check_same_training(run, reference, steps):
    """All steps of a run have the losses and gradient norms of the reference."""
    ours, theirs = records(run), records(reference)[:steps]
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == list(range(1, steps + 1))
    # The norm of a large tensor is a sum in fp32, of other parts under other layouts.
    for key, near in (("loss", 1e-4), ("grad_norm", 1e-3)):
        told, expected = ([record[key] for record in kept] for kept in (ours, theirs))
        print(f"{run.name}: {key}:", [f"{a / b - 1:.1e}" for a, b in zip(told, expected, strict=True)])
        assert told == pytest.approx(expected, rel=near)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "data 4"])
def test_losses_of_a_job_do_not_depend_on_the_layout_and_the_log_names_it(layouts, layout):
    reference, _ = layouts("data 4", 8)
    run, log = layouts(layout)
    axes, crossing = layout.partition(",")[0], CROSSES_HOSTS.get(layout, "data")  # never tensor
    assert f"\nlayout: {layout}\n" in log and f"ranks = {axes}" in log and f"between hosts: {crossing}\n" in log
    check_same_training(run, reference, 6)
    assert records(reference)[-1]["loss"] < records(reference)[0]["loss"] - 0.5


def test_a_job_that_was_saved_under_one_layout_goes_on_under_another(layouts):
    reference, _ = layouts("data 4", 8)
    saved, _ = layouts("pipeline 2 x tensor 2")
    shutil.copytree(saved, saved.parent / "goes on")
    run, log = layouts("data 2 x pipeline 2, sharding full over 2 ranks", 8, saved.parent / "goes on")
    assert "\nlayout: data 2 x pipeline 2, sharding full over 2 ranks\n" in log and "continuing from step 6" in log
    assert [record["restart"] for record in records(run)] == [0] * 6 + [1] * 2
    check_same_training(run, reference, 8)
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (run, reference))
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)


@pytest.mark.timeout(1500)
def test_a_job_whose_time_is_up_is_saved_queued_again_and_repeats_an_uninterrupted_one(cluster, module_load, project):
    script, how = (
        ROOT / "slurm/train_bert.sbatch",
        (*SMALL, "train.lr_scheduler_type=constant", "checkpoint.every_steps=0"),
    )
    run, reference = project / "runs/minute", project / "runs/uninterrupted"

    def submit(options, steps, folder):
        told = (f"train.max_steps={steps}", f"run.output_dir={folder}")
        return cluster.submit(*TWO_BY_TWO, *options, script, *how, *told, cwd=project, before=module_load)

    minutes, times = map(int, os.environ.get("HPCLLM_TEST_LIMIT", "1x1").split("x"))
    number = submit((f"--time={minutes}",), 1_000_000, run)
    for life in range(times):
        cluster.wait(number, timeout_s=60, until={"RUNNING", "FAILED"})
        job = cluster.wait(number, timeout_s=60 * minutes + 40, until={"PENDING", "COMPLETED", "FAILED", "TIMEOUT"})
        assert job["JobState"] == "PENDING" and "(the time limit), saved in" in job["log"], job["log"]
        last = records_of_life(run, life)[-1]
        assert (run / f"checkpoint-{last['step']}/.complete").is_file()
        print(f"\nstart {life + 1}: saved {stops(run)[-1]['time'] - last['time']:.2f} s after the last step")
        deadline = time.monotonic() + 90
        while (state := cluster.job(number)["JobState"]) == "PENDING":
            assert time.monotonic() < deadline
            time.sleep(5)  # its end takes a while, after which Slurm would have it wait for two minutes
            cluster.login(f"scontrol update jobid={number} starttime=now", check=False)
    while len(records_of_life(run, times)) < 5:
        assert time.monotonic() < deadline and state == "RUNNING", cluster.job(number)["log"]
        time.sleep(0.2)
    (run / "STOP").touch()
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", str(times)), job["log"]
    steps = [record["step"] for record in records(run)]
    assert steps == list(range(1, len(steps) + 1))  # none lost, none twice
    job = cluster.wait(submit((), len(steps), reference), timeout_s=200 + 60 * minutes * times)
    assert job["JobState"] == "COMPLETED", job["log"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (folder / f"checkpoint-{len(steps)}" / name for folder in (run, reference))
        assert ours.read_bytes() == theirs.read_bytes()
    assert [record["loss"] for record in records(run)] == [record["loss"] for record in records(reference)]


def stops(run):
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "stop"]


def records_of_life(run, life):
    return [record for record in records(run) if record["restart"] == life] if (run / "metrics.jsonl").exists() else []


def test_missing_data_fails_the_job_with_66_and_names_the_folder(cluster, module_load, job_folder):
    number = cluster.submit(*TWO_BY_TWO, ROOT / "slurm/train_bert.sbatch", cwd=job_folder, before=module_load)
    job = cluster.wait(number, timeout_s=60)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "66:0"), job["log"]
    assert job["log"].count("corpus/prepared") == 1


@pytest.mark.timeout(900)
def test_a_killed_rank_starts_the_run_again_then_a_spare_node_takes_a_dead_one_s_place_then_fewer_go_on(
    cluster, module_load, project
):
    run = project / "runs/spares"
    settings = (*SMALL, "train.max_steps=100", f"run.output_dir={run}", "checkpoint.every_steps=5")
    number = cluster.submit(
        *("--nodes=3", "--ntasks-per-node=2", ROOT / "slurm/train_bert.sbatch", *settings),
        cwd=project,
        before=f"{module_load}; export HPCLLM_SPARE_NODES=1",
    )

    killed = []

    def wait_for_a_save(life):
        """Until this start of the run has saved a checkpoint of its own."""
        deadline = time.monotonic() + 180
        while not any(
            (run / f"checkpoint-{record['step']}/.complete").exists() for record in records_of_life(run, life)
        ):
            job = cluster.job(number)
            assert time.monotonic() < deadline and job["JobState"] in {"PENDING", "RUNNING"}, job["log"]
            time.sleep(0.1)

    try:
        wait_for_a_save(0)
        os.kill(jobs.ranks_with(f"run.output_dir={run}")[-1], signal.SIGKILL)
        for life, node in ((1, "n2"), (2, "n3")):
            wait_for_a_save(life)
            cluster.control("kill", node, cluster.folder)
            killed.append(time.time())
        job = cluster.wait(number, timeout_s=200)
    finally:
        for node in ("n2", "n3"):
            cluster.control("heal", node, cluster.folder)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), job["log"]
    hosts = [job["log"].count(f"4 ranks on 2 hosts (n1, {node})") for node in ("n2", "n3")]
    assert hosts == [2, 1] and "2 ranks on 1 host (n1)" in job["log"], job["log"]
    said = re.findall(r" (\d) of 3 nodes answer; launched again \(1 of 3 without a new checkpoint\)", job["log"])
    assert said == ["3", "2", "1"], job["log"]
    lives = {life: [r for r in records(run) if r["restart"] == life] for life in range(4)}
    for before, after in ((0, 1), (1, 2), (2, 3)):
        assert lives[before][0]["step"] < lives[after][0]["step"] <= lives[before][-1]["step"] + 1
    assert lives[3][-1]["step"] == 100
    # Of it are 10 s those after which Slurm misses a node (SlurmdTimeout of the test cluster), at least.
    again = [lives[life][0]["time"] - moment for life, moment in zip((2, 3), killed, strict=True)]
    print(f"from the death of a node to the next step: {', '.join(f'{seconds:.0f} s' for seconds in again)}")
    deadline = time.monotonic() + 60
    while cluster.login("sinfo -h -t idle -o %D").stdout.strip() != "3":
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_job_goes_on_from_its_last_checkpoint_on_other_nodes_after_a_node_has_died(cluster, module_load, project):
    run = project / "runs/death"
    settings = (*SMALL, "train.max_steps=60", f"run.output_dir={run}", "checkpoint.every_steps=5")
    options, script = (*TWO_BY_TWO, "--no-kill=off"), ROOT / "slurm/train_bert.sbatch"
    number = cluster.submit(*options, script, *settings, cwd=project, before=module_load)
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

"""Claims about slurm/launch.sh and slurm/submit.sh, with commands of Slurm and PBS that only note what is asked."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcllm import batch
from hpcllm.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "slurm"

# Each start takes a line of `fate`: exit code, node that dies with it, step of a checkpoint written before; - for none.
# A process on a node that is dead does not start. What was started is in `asked`, what was tried out in `tried`.
STARTS = """#!/bin/bash
here=$(dirname "$0")
nodes=$(printf '%s\\n' "$@" | sed -n 's/^--nodelist=//p' | tr , ' ')
if [ "${@: -1}" = true ]; then
    [ -n "$nodes" ] || nodes=${@: -2:1}
    echo "$nodes" >>"$here/tried"
    for node in $nodes; do ! grep -qx "$node" "$here/dead" || exit 1; done
    exit
fi
echo "$(basename "$0") $*" >>"$here/asked"
echo "$HPCLLM_LAUNCH" >>"$here/launches"
while [ $# -gt 0 ]; do [ "$1" != -machinefile ] || echo "machines: $(paste -sd' ' "$2")" >>"$here/asked"; shift; done
read -r code node step <"$here/fate"
sed -i 1d "$here/fate"
[ "$node" = - ] || echo "$node" >>"$here/dead"
[ "$step" = - ] || { mkdir -p "runs/gpt/checkpoint-$step" && touch "runs/gpt/checkpoint-$step/.complete"; }
case $code in
ends)
    mkdir -p runs/gpt
    for event in start end; do
        echo '{"event": "'$event'", "restart": 0, "time": 1.0}' >>runs/gpt/events.jsonl
    done
    exit 0
    ;;
*-sticks) echo "srun: error: Application launch failed: Unspecified error" >&2 && exec sleep 60 ;;
*-hangs)
    echo "srun: error: n2: task 0: Exited with exit code ${code%-*}" >&2
    echo "srun: error: n1: tasks 0-1: Exited with exit code 1" >&2
    exec sleep 60
    ;;
esac
exit "$code"
"""
COMMANDS = {
    "srun": STARTS,
    "mpirun": STARTS,
    "scontrol": """#!/bin/bash
case "$1 $2" in
"show hostnames") [ "$3" = "n[1-4]" ] && printf '%s\\n' n1 n2 n3 n4 ;;
"show job") cat "$(dirname "$0")/job" ;;
*) echo "scontrol $*" ;;
esac
""",
    "sinfo": '#!/bin/bash\ncat "$(dirname "$0")/states"\n',
    "squeue": """#!/bin/bash
cd "$(dirname "$0")" && case "$*" in *%T) cat state ;; *%i) cat steps ;; *) cat end ;; esac
""",
    "sbatch": """#!/bin/bash
cd "$(dirname "$0")" && echo "$*" >>asked && echo "$((100 + $(wc -l <asked)));cluster"
""",
}
FILES = {
    "asked": "",
    "tried": "",
    "dead": "",
    "job": "JobId=17\n",
    "states": "",
    "state": "RUNNING\n",
    "steps": "",
    "end": "N/A\n",
}
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "8"}


@pytest.fixture
def job(tmp_path):
    """Run a job script whose starts meet `fate`; returns what was started, (exit code, log), launch's lines."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, text in (COMMANDS | FILES).items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)

    def run(*fate, script="train_gpt", arguments=(), files=None, env=JOB, timeout_s=100, **more):
        for name, text in (FILES | (files or {}) | {"fate": "".join(f"{line}\n" for line in fate)}).items():
            (fakes / name).write_text(text)
        done = subprocess.run(
            ["bash", SLURM / f"{script}.sbatch", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=tmp_path,
            env={
                "HOME": str(tmp_path),
                "PATH": f"{fakes}:{sys.prefix}/bin:/usr/bin:/bin",
                "PYTHONPATH": str(ROOT),
                **({"TZ": os.environ["TZ"]} if "TZ" in os.environ else {}),
                **env,
                **more,
            },
            stdin=subprocess.DEVNULL,
        )
        asked = (fakes / "asked").read_text().splitlines()
        said = [line.split(" launch: ")[1] for line in done.stdout.splitlines() if " launch: " in line]
        return asked, (done.returncode, done.stdout + done.stderr), said

    run.folder, run.fakes = tmp_path, fakes
    return run


def on(line):
    """Nodes, tasks and list of nodes that a start names."""
    return [each for each in line.split() if each.startswith(("--nodes=", "--ntasks=", "--nodelist="))]


def test_a_dead_node_costs_a_start_and_the_rest_go_on_from_the_newest_checkpoint(job):
    asked, (code, log), said = job("143 n2 50", "0 - -", files={"states": "n1 mixed\nn2 mixed\nn3 mixed\nn4 mixed\n"})
    assert code == 0 and len(asked) == 2 and not on(asked[0])
    assert on(asked[1]) == ["--nodes=3", "--ntasks=6", "--nodelist=n1,n3,n4"]
    assert asked[1].endswith("train_gpt.toml --resume")
    assert said == ["exit code 143, 3 of 4 nodes answer; launched again (1 of 3 without a new checkpoint)"]
    assert " n[1-4], start 1: srun" in log and " n1,n3,n4, start 1, launch 2: srun" in log
    assert (job.fakes / "launches").read_text() == "0\n1\n"  # by which a run knows that what came before is over
    # All at once first, then one by one.
    assert sorted((job.fakes / "tried").read_text().split("\n")) == ["", "n1", "n1 n2 n3 n4", "n2", "n3", "n4"]


def test_nodes_that_slurm_has_given_up_are_not_waited_for(job):
    states = "n1 allocated\nn2 down*\nn3 allocated*\nn3 allocated*\nn4 draining\n"
    asked, (code, _), said = job("1 - -", "0 - -", files={"states": states})
    assert code == 0 and on(asked[1]) == ["--nodes=2", "--ntasks=4", "--nodelist=n1,n4"]
    assert said[0].startswith("exit code 1, 2 of 4 nodes answer; launched again")
    assert (job.fakes / "tried").read_text() == "n1 n4\n"


def test_a_spare_node_takes_the_place_of_one_that_died(job):
    asked, (code, log), said = job("137 n1 -", "137 n3 -", "0 - -", HPCLLM_SPARE_NODES="1")
    assert code == 0, log
    assert [on(line)[2] for line in asked] == ["--nodelist=n1,n2,n3", "--nodelist=n2,n3,n4", "--nodelist=n2,n4"]
    assert [on(line)[1] for line in asked] == ["--ntasks=6", "--ntasks=6", "--ntasks=4"] and len(said) == 2
    _, (code, log), _ = job("0 - -", HPCLLM_SPARE_NODES="4")
    assert code == 2 and "HPCLLM_SPARE_NODES=4 leaves no node of 4" in log


@pytest.mark.parametrize("code", [0, 2, 65, 66, 73, 74, 75, 93, 124, 130, 1])
def test_what_hpcllm_ends_with_and_errors_on_living_nodes_are_not_tried_again(job, code):
    asked, (ended, log), said = job(f"{code} - -", "0 - -")
    assert (ended, len(asked), said) == (code, 1, []) and ("scontrol requeue 17" in log) == (code == 75)


@pytest.mark.parametrize("code", [129, 137, 139, 143, 9, 11, 14])
def test_a_signal_and_a_hang_for_a_dead_node_are_tried_again(job, code):
    assert job(f"{code} - -", "0 - -")[1][0] == 0
    asked, (ended, log), _ = job("124 n3 -", "0 - -")
    assert (ended, on(asked[1])[2]) == (0, "--nodelist=n1,n2,n4"), log


def test_a_rank_that_is_killed_again_and_again_ends_the_job_but_not_one_that_gets_on(job):
    asked, (code, log), said = job(*["137 - -"] * 9)
    assert (code, len(asked)) == (137, 4) and said[2].endswith("launched again (3 of 3 without a new checkpoint)")
    assert said[3].endswith("not launched again: HPCLLM_RELAUNCHES=3 without a new checkpoint")
    assert "requeue" not in log
    asked, (code, log), said = job("137 - -", "137 - 10", "137 - 20", "137 - -", "0 - -", HPCLLM_RELAUNCHES="2")
    assert (code, len(asked)) == (0, 5)
    assert [line.partition("(")[2][:1] for line in said] == ["1", "1", "1", "2"]


def test_a_run_that_has_not_ended_is_started_again_though_mpirun_says_all_is_well(job):
    (job.folder / "mine.sh").write_text(f"source {SLURM}/site.sh\nother_launcher=(mpirun --with-ft ulfm -np 2)\n")
    asked, (code, log), says = job("0 - 10", "ends - -", env={}, HPCLLM_SITE="mine.sh")
    assert code == 0 and len(asked) == 2, log
    # What an earlier start has said counts for nothing, unless all is done.
    asked, (code, log), _ = job("0 - 11", "ends - -", env={}, HPCLLM_SITE="mine.sh")
    assert code == 0 and len(asked) == 2, log
    (job.folder / "runs/gpt/STOP").touch()
    asked, (code, log), _ = job("0 - -", env={}, HPCLLM_SITE="mine.sh")
    assert code == 0 and len(asked) == 1, log
    assert "exit code 137, 0 of 0 nodes answer; launched again" in says[0], says


def test_a_job_with_no_time_left_or_that_is_cancelled_is_not_started_again(job):
    soon = time.strftime("%Y-%m-%dT%H:%M:%S\n", time.localtime(time.time() + 60))
    asked, (code, _), said = job("143 - -", files={"end": soon})
    assert (code, len(asked)) == (143, 1) and "not launched again: the job has " in said[0]
    asked, (code, log), said = job("143 n2 -", files={"state": "COMPLETING\n"})
    assert (code, len(asked)) == (143, 1) and said[0].endswith("not launched again: the job is being ended")
    assert "requeue" not in log


def test_a_job_that_needs_its_dead_nodes_is_queued_again(job):
    # Two nodes of four do not divide what three do, or the starts are used up.
    _, (code, log), _ = job("143 n2 -", "2 - -")
    assert code == 2 and "scontrol requeue 17\n" in log
    asked, (code, log), said = job("143 n2 -", HPCLLM_RELAUNCHES="0")
    assert (code, len(asked), len(said)) == (143, 1, 1) and "scontrol requeue 17\n" in log
    _, (code, log), _ = job("143 n2 -", "93 - -")
    assert code == 93 and "requeue" not in log


def test_where_no_node_can_be_tried_all_count_and_predictions_go_on_too(job):
    rows = ("runs/ner", "rows.jsonl", "answers.jsonl")
    how = {"script": "predict", "arguments": rows, "files": {"dead": "n1\nn2\nn3\nn4\n"}}
    asked, (code, log), said = job("139 - -", "0 - -", **how)
    assert code == 0 and len(asked) == 2 and not on(asked[1]) and asked[0] == asked[1], log
    assert said[0].startswith("exit code 139, 4 of 4 nodes answer")


def test_under_pbs_mpirun_gets_the_nodes_that_are_left(job):
    (job.folder / "nodes").write_text("a\na\nb\nb\nc\nc\n")
    env = {"PBS_NODEFILE": str(job.folder / "nodes"), "PBS_JOBID": "9.pbs", "HPCLLM_RANKS": "6"}
    asked, (code, log), said = job("137 b -", "0 - -", env=env)
    assert code == 0 and asked[0].startswith("mpirun -np 6 hpcllm train"), log
    assert asked[1].startswith("mpirun -np 4 -machinefile ") and asked[2] == "machines: a a c c"
    assert said == ["exit code 137, 2 of 3 nodes answer; launched again (1 of 3 without a new checkpoint)"]
    asked, _, _ = job("0 - -", env=env, HPCLLM_SPARE_NODES="1")
    assert asked[0].startswith("mpirun -np 4 -machinefile ") and asked[1] == "machines: a a b b"


def test_on_a_workstation_a_rank_that_was_killed_is_started_again(job):
    asked, (code, log), _ = job("137 - -", "0 - -", env={}, HPCLLM_RANKS="3", HPCLLM_SPARE_NODES="1")
    assert code == 0 and len(asked) == 2 and asked[0] == asked[1] and asked[0].startswith("mpirun -np 3 hpcllm"), log


ARRAY = JOB | {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "4"}


def test_members_of_an_array_train_in_folders_of_their_own_and_a_chain_goes_on_in_one(job):
    def settings(*arguments, **how):
        asked, (code, log), _ = job("0 - -", env=ARRAY, arguments=arguments, **how)
        assert code == 0, log
        return asked[0].partition("train_gpt.toml ")[2]

    assert settings() == "run.output_dir=runs/gpt/task-4 --resume"
    assert settings("run.output_dir=my", "train.max_steps=900") == (
        "run.output_dir=my train.max_steps=900 run.output_dir=my/task-4 --resume"
    )
    throttled = {"job": "JobId=18 ArrayJobId=17 ArrayTaskId=4 ArrayTaskThrottle={} JobName=x\n   More=1\n"}
    for at_once, expected in (("1", "--resume"), ("10", "run.output_dir=runs/gpt/task-4 --resume")):
        assert settings(files={"job": throttled["job"].format(at_once)}) == expected
    one = {"job": throttled["job"].format("1")}
    assert settings(HPCLLM_ARRAY="chain") == "--resume"
    assert settings(files=one, HPCLLM_ARRAY="members") == "run.output_dir=runs/gpt/task-4 --resume"
    assert settings("run.output_dir=my/%a", "run.seed=%a") == "run.output_dir=my/4 run.seed=4 --resume"
    assert settings("run.seed=%a") == "run.seed=4 run.output_dir=runs/gpt/task-4 --resume"
    assert settings("run.output_dir=sweep", "run.seed=%a") == (
        "run.output_dir=sweep run.seed=4 run.output_dir=sweep/task-4 --resume"
    )
    for how, said in (({"files": {"job": ""}}, "does not tell"), ({"HPCLLM_ARRAY": "member"}, "neither members nor")):
        asked, (code, log), _ = job("0 - -", env=ARRAY | {"HPCLLM_PROBE_S": "0"}, **how)
        assert (code, asked) == (2, []) and said in log, log
    asked, _, _ = job("0 - -", env={"PBS_ARRAY_INDEX": "5"})
    assert "run.output_dir=runs/gpt/task-5 " in asked[0]
    # Never in the folder of others because its own is not known.
    asked, (code, log), _ = job("0 - -", env=ARRAY, arguments=("train.max_step=3",))
    assert (code, asked) == (2, []) and log.count('unknown key "max_step"') == 1
    # A member alone is queued again.
    _, (_, log), _ = job("75 - -", env=ARRAY)
    assert "scontrol requeue 17_4\n" in log


def test_a_heterogeneous_job_starts_all_of_its_parts_at_once(job):
    parts = {"SLURM_HET_SIZE": "2", "SLURM_CPUS_PER_TASK_HET_GROUP_0": "8", "SLURM_CPUS_PER_TASK_HET_GROUP_1": "4"}
    asked, (code, log), _ = job("137 - -", "0 - -", env=JOB | parts)
    assert code == 0 and len(asked) == 2, log
    for line in asked:
        assert "--het-group=0-1 --cpus-per-task=4 hpcllm train" in line and not on(line)


def test_srun_of_parts_that_does_not_return_after_its_ranks_have_ended_is_killed(job):
    parts = {"SLURM_HET_SIZE": "2", "SLURM_JOB_ID_HET_GROUP_1": "18", "HPCLLM_STEP_POLL_S": "0.1"}
    _, (code, log), _ = job("75-hangs - -", env=JOB | parts, files={"steps": "17.batch\n17.extern\n"})
    assert code == 75 and "by what it said of them, exit code 75" in log and "scontrol requeue 17" in log, log
    # It told of no task, and Slurm has known of none: nothing was trained.
    _, (code, log), _ = job("0-sticks - -", env=JOB | parts, files={"steps": "17.batch\n"})
    assert code == 1 and "launched again" not in log, log
    # Not while a part has ranks.
    with pytest.raises(subprocess.TimeoutExpired):
        job("75-hangs - -", env=JOB | parts, files={"steps": "17.batch\n18.3\n"}, timeout_s=4)


def test_a_heterogeneous_job_that_has_lost_a_node_is_queued_again(job):
    parts = {"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "n1", "SLURM_JOB_NODELIST_HET_GROUP_1": "n[2-3]"}
    for state, again in (("down*", True), ("allocated", False)):
        _, (code, log), _ = job("1 - -", env=JOB | parts, files={"states": f"{state}\n"})
        assert (code, "scontrol requeue 17\n" in log) == (1, again), log


def test_mpirun_in_a_slurm_job_is_told_the_nodes_that_are_left_in_its_own_words(job):
    (job.folder / "mine.sh").write_text(f"source {SLURM}/site.sh\nslurm_launcher=(mpirun --with-ft ulfm -np 8)\n")
    asked, (code, log), _ = job("137 n2 10", "0 - -", "ends - -", HPCLLM_SITE="mine.sh")
    assert code == 0 and len(asked) == 3, log
    assert "mpirun --with-ft ulfm -np 6 --host n1:2,n3:2,n4:2 hpcllm train" in asked[1] == asked[2], log


def submit(job, *arguments):
    env = {"PATH": f"{job.fakes}:/usr/bin:/bin"}
    done = subprocess.run([SLURM / "submit.sh", *arguments], capture_output=True, text=True, env=env)
    return done.returncode, done.stdout.split(), (job.fakes / "asked").read_text().splitlines(), done.stderr


def test_jobs_of_a_chain_wait_for_the_one_before(job):
    code, numbers, asked, _ = submit(job, "--chain", "3", "--nodes=8", "my job.sbatch", "a=1")
    assert (code, numbers) == (0, ["101", "102", "103"])
    assert asked == [
        "--parsable --nodes=8 my job.sbatch a=1",
        "--parsable --dependency=afterany:101 --nodes=8 my job.sbatch a=1",
        "--parsable --dependency=afterany:102 --nodes=8 my job.sbatch a=1",
    ]
    for wrong in ((), ("--chain", "0", "a"), ("--chain", "x", "a"), ("--chain", "3")):
        assert submit(job, *wrong)[0] == 2
    (job.fakes / "sbatch").write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    assert submit(job, "--chain", "3", "a.sbatch")[::3] == (1, "no such partition\n")


def test_what_the_job_scripts_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCLLM_END_TIME", "1000")
    assert (batch.left(900.5), batch.left(2000)) == (99, 0)
    run_file, here = SLURM / "train_gpt.toml", f"run.output_dir={tmp_path}"
    assert batch.folder(run_file) == "runs/gpt" and batch.folder(run_file, here, "--resume") == str(tmp_path)
    assert batch.newest(run_file, here) == 0
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "damaged-checkpoint-20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".complete").touch()
    (tmp_path / "checkpoint-11").mkdir()  # is being written
    assert batch.newest(run_file, here) == 10
    (tmp_path / "checkpoint-50").mkdir()
    (tmp_path / "checkpoint-50" / ".complete").touch()
    assert (batch.starts(run_file, here), batch.over("0", run_file, here)) == (0, "no")
    names = ("start", "end", "start")
    lines = [json.dumps({"event": name, "restart": 0, "time": 1.0, "max_steps": 50}) + "\n" for name in names]
    (tmp_path / "events.jsonl").write_text("".join(lines[:2]))
    assert batch.starts(run_file, here) == 1
    assert (batch.over("0", run_file, here), batch.over("1", run_file, here)) == ("yes", "no")
    (tmp_path / "results.json").touch()
    over = [batch.over("1", run_file, here, f"train.max_steps={steps}") for steps in (50, 51)]
    assert over == ["yes", "no"]  # there was nothing to do, and there was
    (tmp_path / "events.jsonl").write_text("".join(lines) + '{"event": "end", "rest')
    assert batch.over("1", run_file, here) == "no"
    (tmp_path / "STOP").touch()
    assert batch.over("1", run_file, here) == "yes"
    with pytest.raises(UsageError):
        batch.folder(run_file, "run.oops=1")
    code = "import sys, json, runpy; runpy.run_module('hpcllm.batch', run_name='__main__')"
    code += "; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code, "left"], capture_output=True, text=True, env=dict(os.environ))
    told, modules = done.stdout.splitlines()
    assert told == "0" and not {"torch", "mpi4py", "transformers"} & set(json.loads(modules))

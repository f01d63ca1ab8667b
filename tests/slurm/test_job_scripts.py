"""Claims about the job scripts that need no Slurm: what they hold, and that they run as plain bash on a workstation."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import jobs
from hpcllm import config
from hpcllm.parallel import mesh

SLURM = Path(__file__).resolve().parents[2] / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_each_option_is_explained_and_the_exit_code_is_that_of_the_ranks(script):
    lines = script.read_text().splitlines()
    options = [line for line in lines if re.match(r"#+SBATCH", line)]
    assert all(re.search(r"\S {2,}# \w", line) for line in options)
    wanted = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "output", "open-mode"}
    assert wanted <= {re.match(r"#+SBATCH --([\w-]+)", line)[1] for line in options}
    again = ["again $rc   # 75: saved before the time was up"] if "hpcllm train" in script.read_text() else []
    end = ["rc=$?", *again, "exit $rc"]
    assert lines[-len(end) - 1].startswith("launch hpcllm ") and lines[-len(end) :] == end
    # Slurm does not make the folder of a log, and drops the log without a word where it is missing.
    assert not any(re.search(r"--output=\S*/", line) for line in options)


def test_nothing_prints_secrets_or_reaches_for_another_mpi():
    for script in [*SCRIPTS, *SLURM.glob("*.sh")]:
        code = [line.split("# ")[0] for line in script.read_text().splitlines() if not line.startswith("#")]
        assert not [line for line in code if re.search(r"set -\w*x|\benv\b|printenv|TOKEN|LD_LIBRARY_PATH", line)]


def test_the_two_training_scripts_differ_in_the_name_alone():
    bert, gpt = ((SLURM / f"train_{name}.sbatch").read_text() for name in ("bert", "gpt"))
    same = bert.replace("BERT", "GPT").replace("bert", "gpt")
    assert [line.split() for line in same.splitlines()] == [line.split() for line in gpt.splitlines()]


def test_the_job_of_three_axes_is_that_of_gpt_and_shows_its_mesh_before_it_trains():
    gpt, axes = ((SLURM / f"{name}.sbatch").read_text().splitlines() for name in ("train_gpt", "train_gpt_3d"))
    commands = [line.replace("train_gpt_3d", "train_gpt") for line in axes if line and line[0] != "#"]
    show = next(number for number, line in enumerate(commands) if line.endswith("--show-mesh 2>/dev/null"))
    assert commands.pop(show).split()[:3] == ["launch", "hpcllm", "plan"] and commands[show].startswith("launch hpcllm")
    assert commands == [line for line in gpt if line and line[0] != "#"]
    options = [re.findall(r"^#+SBATCH --([\w-]+)", "\n".join(lines), re.M) for lines in (gpt, axes)]
    assert options[0] == options[1]


@pytest.mark.parametrize(
    ("name", "data", "task"),
    [("classification", "texts", "sequence_classification"), ("qa", "qa", "question_answering")],
)
def test_the_scripts_that_fine_tune_differ_in_names_alone(name, data, task):
    ner, texts = ((SLURM / f"finetune_{name}.sbatch").read_text() for name in ("ner", name))
    ner, texts = (script[script.index("# Options before the file name") :] for script in (ner, texts))
    for one, other in (
        ("finetune_ner", f"finetune_{name}"),
        ("corpus/ner", f"corpus/{data}"),
        ("/ner", f"/{name}"),
    ):
        ner = ner.replace(one, other)
    same = ner.replace("token_classification", task).replace("training sentences", "training texts")
    assert [line.split() for line in same.splitlines()] == [line.split() for line in texts.splitlines()]


FINE_TUNE = ["ner", "classification", "qa"]


@pytest.mark.parametrize(
    "name", ["train_bert", "train_gpt", "train_gpt_3d", *(f"finetune_{name}" for name in FINE_TUNE)]
)
def test_the_run_file_fits_the_job_script_beside_it(name):
    script = (SLURM / f"{name}.sbatch").read_text()
    options = script[script.index("#SBATCH") :]
    nodes, tasks = (int(re.search(rf"--{option}=(\d+)", options)[1]) for option in ("nodes", "ntasks-per-node"))
    # As it is, and the example in the script's head: more nodes and a larger batch.
    more = re.search(r"--nodes=(\d+) slurm/\S+ (.*)", script)
    for hosts, overrides in ((nodes, []), (int(more[1]), more[2].split())):
        settings = config.load(SLURM / f"{name}.toml", overrides)
        layout = mesh.layout(settings.parallel, [host for host in range(hosts) for _ in range(tasks)])
        assert settings.train.accumulation(layout.data) >= layout.pipeline  # or stages would be idle most of the time
        assert tasks % layout.tensor == 0  # that axis stays within hosts
    if name == "train_gpt_3d":
        assert min(layout.data, layout.pipeline, layout.tensor) > 1


def bash(script, *arguments, cwd, ranks, path=f"{sys.prefix}/bin:", timeout_s=120, **env):
    """Run a job script as a user on a workstation would, with the commands of `path` before those of the system."""
    return subprocess.run(
        ["bash", script, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
        env={
            "HOME": str(cwd),
            "PATH": f"{path}/usr/local/bin:/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "HPCLLM_PROGRESS": "lines",
            "HPCLLM_RANKS": str(ranks),
            "PYTHONPATH": str(SLURM.parent),
            **env,
        },
        stdin=subprocess.DEVNULL,
    )


def test_without_slurm_the_same_scripts_prepare_and_train_with_mpirun(tmp_path):
    here = tmp_path / "my workstation"
    here.mkdir()
    ranks = 2 * os.cpu_count() if os.cpu_count() <= 2 else 3  # more than cores, where that is cheap
    texts = "".join(
        json.dumps({"text": f"The {n} of {n * n} is {n * n * n}, said rank {n % 7}."}) + "\n" for n in range(999)
    )
    (here / "texts.jsonl").write_text(texts)
    done = bash(
        SLURM / "prepare.sbatch",
        *("--input", "texts.jsonl", "--jsonl-field", "text", "--output", "corpus/prepared"),
        *("--vocab-size", "300", "--validation-fraction", "0.05"),
        cwd=here,
        ranks=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = bash(
        SLURM / "train_bert.sbatch",
        *("train.max_steps=3", "train.warmup_steps=0", f"train.global_batch_size={2 * ranks}"),
        *("train.micro_batch_size=2", "train.sequence_length=16", "train.log_every_steps=1"),
        cwd=here,
        ranks=ranks,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ranks} ranks on 1 host" in done.stdout and "start 1: mpirun -np" in done.stdout
    assert (here / "runs/bert/checkpoint-3/.complete").is_file()


def write_tiny_model(folder):
    """A BERT of one layer and its tokenizer, as one finds pre-trained models."""
    import transformers

    from hpcllm.data import tokenizer

    words = tokenizer.train("wordpiece", 60, lambda: iter(["anna sees paris", "bert sees rome"] * 2))
    tokenizer.save(words, "wordpiece", folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    made = transformers.BertConfig(vocab_size=words.get_vocab_size(), **sizes)
    transformers.BertModel(made).save_pretrained(folder)


@pytest.mark.parametrize("name", FINE_TUNE)
def test_without_slurm_labelled_files_become_a_fine_tuned_model(tmp_path, name):
    here, data = tmp_path / "my workstation", tmp_path / "my workstation" / "corpus" / "mine"
    data.mkdir(parents=True)
    write_tiny_model(here / "model")
    if name == "ner":
        lines = [
            f"{who} B-person\nsees O\n{where} B-place\n\n" for who in ("anna", "bert") for where in ("paris", "rome")
        ]
        train, test = ("train.conll", "".join(lines * 10)), ("test.conll", "".join(lines))
    elif name == "qa":
        asked = [(f"{who} sees {where}", who) for who in ("anna", "bert") for where in ("paris", "rome")]
        asked = [{"context": said, "question": "anna sees", "answers": {"text": [who], "answer_start": [0]}}
                 for said, who in asked]  # fmt: skip
        lines = [json.dumps(record) + "\n" for record in asked]
        train, test = ("train.jsonl", "".join(lines * 10)), ("test.jsonl", "".join(lines))
    else:
        rows = [f"{who} sees {where}\t{where}\n" for who in ("anna", "bert") for where in ("paris", "rome")]
        train, test = ("train.tsv", "text\tlabel\n" + "".join(rows * 10)), ("test.tsv", "text\tlabel\n" + "".join(rows))
    for file, text in (train, test, (train[0].replace("train", "validation"), test[1])):
        (data / file).write_text(text)
    done = bash(
        SLURM / f"finetune_{name}.sbatch",
        *("train.num_train_epochs=1", "train.global_batch_size=8", "train.micro_batch_size=4"),
        cwd=here,
        ranks=2,
        MODEL="model",
        DATA="corpus/mine",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = here / "runs" / name
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == 5 and results["test_samples"] == results["eval_samples"] == 4
    assert results["best_step"] == 5 and (run / "checkpoint-5" / ".complete").is_file()
    assert (run / "test_report.txt").read_text() in done.stdout


def test_a_job_that_predicts_names_model_input_and_output_and_hands_on_the_rest(tmp_path):
    (tmp_path / "mine.sh").write_text("launch() { printf '<%s>' \"$@\"; return 7; }\nagain() { :; }\n")
    script, asked = SLURM / "predict.sbatch", ("my run", "rows *.jsonl", "out.jsonl")
    done = bash(script, *asked, "--top-k", "2", cwd=tmp_path, ranks=2, HPCLLM_SITE="mine.sh")
    expected = "<hpcllm><predict><my run><--input><rows *.jsonl><--output><out.jsonl><--top-k><2>"
    assert (done.returncode, done.stdout) == (7, expected)
    done = bash(script, *asked[:2], cwd=tmp_path, ranks=2, HPCLLM_SITE="mine.sh")
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch slurm/predict.sbatch MODEL INPUT OUTPUT")


@pytest.mark.parametrize("name", FINE_TUNE)
def test_a_job_that_fine_tunes_prepares_once_and_says_what_it_misses(tmp_path, name):
    (tmp_path / "mine.sh").write_text("launch() { printf '<%s>' \"$@\"; echo; }\nagain() { :; }\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()

    def run(**env):
        script = SLURM / f"finetune_{name}.sbatch"
        done = bash(script, "a b", cwd=tmp_path, ranks=2, HPCLLM_SITE="mine.sh", **env)
        return done.returncode, done.stdout.splitlines(), done.stderr

    code, told, why = run()
    assert (code, told) == (66, []) and f"finetune_{name}: no pre-trained model in 'models/pretrained'" in why
    code, told, why = run(MODEL="model", DATA="my data")
    assert (code, told) == (66, []) and "no shards in 'my data/prepared', no file 'my data/train.*': set DATA" in why
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "train.jsonl").touch()
    code, told, why = run(MODEL="model", DATA="my data")
    assert (code, len(told), why) == (0, 2, "") and told[0].endswith("<my data/train.*><--validation-fraction><0.1>")
    for part in ("validation", "test"):
        (tmp_path / "my data" / f"{part}.jsonl").touch()
    _, told, _ = run(MODEL="model", DATA="my data")
    assert told[0].endswith("<my data/train.*><--validation><my data/validation.*><--test><my data/test.*>")
    for part in ("train", "test"):
        (tmp_path / "shards" / part).mkdir(parents=True)
    code, told, why = run(MODEL="model", PREPARED="shards")
    given = "<model.init_from=model><data.train=shards/train><data.validation=shards/validation><data.test=shards/test>"
    assert (code, why) == (0, "")
    assert told == [f"<hpcllm><train><{SLURM}/finetune_{name}.toml>{given}<a b><--resume>"]


@pytest.mark.skipif(not (SLURM.parent / ".venv/bin/hpcllm").exists(), reason="no .venv in the repository (make venv)")
@pytest.mark.parametrize("name", ["train_gpt", "train_gpt_3d"])
def test_a_script_finds_the_venv_of_its_repository_and_ends_with_the_exit_code_of_a_refusal(tmp_path, name):
    done = bash(SLURM / f"{name}.sbatch", "train.max_step=3", cwd=tmp_path, ranks=2, path="")
    assert done.returncode == 2
    assert done.stderr.count('unknown key "max_step"') == 1


def test_a_site_of_your_own_takes_the_place_of_the_one_in_the_repository(tmp_path):
    (tmp_path / "mine.sh").write_text("launch() { printf '<%s>' \"$@\"; return 7; }\nagain() { :; }\n")
    done = bash(SLURM / "train_gpt.sbatch", "run.output_dir=my runs", cwd=tmp_path, ranks=2, HPCLLM_SITE="mine.sh")
    expected = f"<hpcllm><train><{SLURM}/train_gpt.toml><run.output_dir=my runs><--resume>"
    assert (done.returncode, done.stdout) == (7, expected)


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_job_is_queued_again_when_its_run_was_saved_and_only_then(tmp_path, code):
    site = (
        (SLURM / "site.sh")
        .read_text()
        .replace("slurm_launcher=(\n    srun", f"slurm_launcher=(\n    bash -c 'exit {code}'")
    )
    (tmp_path / "mine.sh").write_text(site)
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "scontrol $*"\n')
    (tmp_path / "scontrol").chmod(0o755)
    how = {"HPCLLM_SITE": "mine.sh", "path": f"{tmp_path}:{sys.prefix}/bin:", "SLURM_JOB_ID": "17"}
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "4"}
    for more, name in (({}, "17"), (array, "17_4")):
        done = bash(SLURM / "train_gpt.sbatch", cwd=tmp_path, ranks=2, **how, **more)
        assert (done.returncode, f"scontrol requeue {name}\n" in done.stdout) == (code, code == 75), done.stderr


def test_a_mesh_that_cannot_be_shown_does_not_end_the_job(tmp_path):
    (tmp_path / "mine.sh").write_text('launch() { printf \'<%s>\' "$@"; echo; [ "$2" = train ]; }\nagain() { :; }\n')
    done = bash(SLURM / "train_gpt_3d.sbatch", "a b", cwd=tmp_path, ranks=2, HPCLLM_SITE="mine.sh")
    run_file = f"{SLURM}/train_gpt_3d.toml"
    expected = [f"<hpcllm><plan><{run_file}><a b><--show-mesh>", f"<hpcllm><train><{run_file}><a b><--resume>"]
    assert (done.returncode, done.stdout.splitlines()) == (0, expected)


def test_other_launchers_than_srun_and_mpirun_are_one_line_of_the_site_profile(tmp_path):
    site = (SLURM / "site.sh").read_text()
    mine = site.replace('other_launcher=(mpirun -np "${HPCLLM_RANKS:-4}")', "other_launcher=(echo mpiexec --ppn 4)")
    assert mine != site
    (tmp_path / "mine.sh").write_text(mine)
    done = bash(SLURM / "train_gpt.sbatch", "a b", cwd=tmp_path, ranks=2, HPCLLM_SITE="mine.sh")
    assert done.stdout.splitlines()[-1] == f"mpiexec --ppn 4 hpcllm train {SLURM}/train_gpt.toml a b --resume"
    assert r"start 1: echo mpiexec --ppn 4 hpcllm train" in done.stdout and r"a\ b" in done.stdout


def test_without_slurm_a_run_goes_on_by_itself_when_a_rank_is_killed(tmp_path):
    write_tiny_model(tmp_path / "model")
    rows = [f"{who} sees {where}\t{where}\n" for who in ("anna", "bert") for where in ("paris", "rome")]
    (tmp_path / "texts").mkdir()
    for part in ("train", "validation"):
        (tmp_path / "texts" / f"{part}.tsv").write_text("text\tlabel\n" + "".join(rows * 40))
    run, steps = tmp_path / "runs" / "classification", 200
    settings = ("train.num_train_epochs=10", "train.global_batch_size=8", "train.micro_batch_size=4")
    settings += ("train.eval_every_steps=0", "train.early_stopping_patience=0")
    settings += ("checkpoint.every_steps=20", f"run.output_dir={run}")

    def kill_one():
        """A rank of the job, once there is a checkpoint."""
        deadline = time.monotonic() + 150
        while not list(run.glob("checkpoint-*/.complete")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(jobs.ranks_with(f"run.output_dir={run}")[-1], signal.SIGKILL)

    with ThreadPoolExecutor() as threads:
        killed = threads.submit(kill_one)
        done = bash(
            *(SLURM / "finetune_classification.sbatch", *settings),
            cwd=tmp_path,
            ranks=2,
            timeout_s=250,
            MODEL="model",
            DATA="texts",
            HPCLLM_SPARE_NODES="1",  # of nodes, of which a workstation has but itself
        )
        killed.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("; launched again (1 of 3 without a new checkpoint)") == 1, done.stdout + done.stderr
    told = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    lives = [(record["restart"], record["step"]) for record in told if "loss" in record]
    first, second = ([step for life, step in lives if life == number] for number in (0, 1))
    assert first[0] == 1 and 20 < second[0] <= first[-1] + 1 and second[-1] == steps

"""One suite, two ways to run it.

`pytest` runs every test in one process; tests of whole commands start `mpirun` themselves (fixture `mpirun`).
`mpirun -np N pytest -m mpi` runs the collective tests in all N ranks: root prints, a test passes when it
passes on every rank, and a rank that fails names itself. Where the others cannot come to hear of it, because they
wait for the failing rank in a collective, it prints its report and ends the job.
"""

import array
import functools
import gc
import inspect
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import tomli_w
from launching import clean_environment, find_mpirun, surviving, warm_python

import hpcllm.mpi
from hpcllm.mpi import launcher

ROOT = Path(__file__).parent.parent
SIZE = launcher.find()[1]  # as the launcher says; 1 without one
PATIENCE_S = 20.0  # how long a rank whose test failed waits for the others
OUTCOMES = ("passed", "failed", "skipped", "left")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    if SIZE > 1 and hpcllm.mpi.join().rank > 0:
        config.pluginmanager.get_plugin("terminalreporter")._tw._file = open(os.devnull, "w")  # noqa: SIM115


def pytest_unconfigure(config):
    if SIZE > 1:
        meet("left", "the end of the tests", "left the tests while others run them")  # root prints its summary first


@functools.cache
def talk():
    """A communicator for the outcomes of tests alone."""
    return hpcllm.mpi.join().comm.Dup()


def meet(outcome, place, report, patience_s=float("inf")):
    """Tell all ranks this one's outcome at `place` and return theirs; without them after `patience_s`, end the job."""
    comm = talk()
    here = array.array("q", [OUTCOMES.index(outcome), zlib.crc32(place.encode())])
    everywhere = array.array("q", [0] * 2 * comm.size)
    request = comm.Iallgather(here, everywhere)
    deadline = time.monotonic() + patience_s
    while not request.Test():
        if time.monotonic() > deadline:
            give_up(f"{place} failed, and the others have not come to hear of it in {patience_s:.0f} s:\n{report}")
        time.sleep(0.0005)
    if set(everywhere[1::2]) != {here[1]}:
        give_up(f"the ranks have come to different places; this one: {place}\n{report}")
    return [OUTCOMES[code] for code in everywhere[::2]]


def give_up(text):
    os.write(2, f"\npytest on rank {talk().rank} of {SIZE}: {text}\n".encode())
    hpcllm.mpi.end_all(1)


def pytest_collection_modifyitems(config, items):
    kept, left = [], []
    for item in items:
        mark = item.get_closest_marker("mpi")
        low, high = (mark.kwargs.get("min_size", 1), mark.kwargs.get("max_size") or SIZE) if mark else (1, 1)
        (kept if low <= SIZE <= high else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def pytest_collection_finish(session):
    gc.freeze()  # as `hpcllm` does after its imports: there are 600,000 objects that stay
    if SIZE > 1:
        errors = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("error", [])
        failed = meet("failed" if errors else "passed", "the end of the collection", "").count("failed")
        if errors and talk().rank > 0:
            os.write(2, "".join(f"on rank {talk().rank}: {error.longreprtext}\n" for error in errors).encode())
        if failed:
            session.testsfailed = max(session.testsfailed, 1)
        else:
            meet("passed", " ".join(item.nodeid for item in session.items), "(the ranks found different tests)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if SIZE > 1:
        text = report.longreprtext if report.failed else ""
        place = f"{item.nodeid} ({report.when})"
        outcomes = meet(report.outcome, place, text, PATIENCE_S if report.failed else float("inf"))
        failed = [rank for rank, outcome in enumerate(outcomes) if outcome == "failed"]
        if failed:
            report.outcome = "failed"
            report.longrepr = f"failed on ranks {failed}; rank {failed[0]}:\n{talk().bcast(text, root=failed[0])}"
        elif len(set(outcomes)) > 1:
            report.outcome = "failed"
            report.longrepr = f"ranks disagree whether to run this test: {outcomes}"
    return report


@pytest.fixture
def world():
    """This process's `hpcllm.mpi.World`, torch.distributed running over it."""
    return hpcllm.mpi.init(device="cpu")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder that `hpcllm prepare` wrote, small, WordPiece; shared by all ranks. Text: Python's own docstrings."""
    from hpcllm.data.prepare import prepare

    world = hpcllm.mpi.join()
    base = Path(world.comm.bcast(str(tmp_path_factory.mktemp("prepared"))))
    if world.is_root:
        texts = {inspect.getdoc(value) for value in vars(str).values()} | {
            inspect.getdoc(value) for value in vars(os).values()
        }
        (base / "text.txt").write_text("\n".join(" ".join(text.split()) for text in sorted(filter(None, texts))))
    world.comm.Barrier()
    prepare(
        world,
        inputs=[str(base / "text.txt")],
        output=str(base / "data"),
        tokenizer=None,
        tokenizer_kind="wordpiece",
        vocab_size=600,
        jsonl_field=None,
        document_separator="newline",
        validation_fraction=0.1,
        shard_tokens=5000,
        overwrite=False,
    )
    return base / "data"


@pytest.fixture
def mpirun():
    """mpirun(n, [arguments of python...]) runs a job and returns its CompletedProcess (text). options: of mpirun.

    warm: ranks are forks of a Python that has imported torch and transformers, which is quicker; see warm.py.

    Raises subprocess.TimeoutExpired, the job being ended first, and with check=True CalledProcessError.
    """

    def run(n, arguments, timeout=120, env=None, check=False, cwd=None, options=(), warm=False):
        python = warm_python() if warm else [sys.executable]
        command = [*find_mpirun(), *options, "-np", str(n), *python, *map(str, arguments)]
        environment = clean_environment(**(env or {}))
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            cwd=cwd,
        ) as job:
            try:
                out, err = job.communicate(timeout=timeout)
            except BaseException:
                end(job)
                raise
        result = subprocess.CompletedProcess(command, job.returncode, out, err)
        if check:
            result.check_returncode()
        return result

    return run


@pytest.fixture
def dying_job(mpirun, prepared, tmp_path):
    """dying_job(name, ranks, [who dies when]) trains in tmp_path/name and returns its CompletedProcess.

    changes: overrides of the run file.
    """
    run_file = tmp_path / "run.toml"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sections = {
        "run": {"output_dir": str(tmp_path / "run"), "seed": 7},
        "data": {"train": f"{prepared}/train"},
        "model": {"task": "masked_lm", "config": {"model_type": "bert", **sizes}},
        "train": {
            "max_steps": 12,
            "global_batch_size": 12,
            "micro_batch_size": 1,
            "sequence_length": 32,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "log_every_steps": 1,
        },
        "checkpoint": {"keep": 4},
    }
    run_file.write_text(tomli_w.dumps(sections))

    def run(name, ranks, deaths=(), *options, ft=True, **changes):
        changes = [f"{key}={value}" for key, value in {"run.output_dir": tmp_path / name, **changes}.items()]
        arguments = [ROOT / "tests" / "dying.py", *deaths, "--", "train", run_file, *options, *changes]
        return mpirun(ranks, arguments, options=surviving() if ft else (), warm=True)

    return run


def end(job):
    """End a job through its mpirun, which knows its ranks; SIGKILL would leave them behind."""
    job.terminate()
    try:
        job.wait(10)
    except subprocess.TimeoutExpired:
        job.kill()

"""The doctor as a job: what it prints and writes, how it exits, and what it says of machines that are really ill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import clean_environment

from hpcllm import doctor
from hpcllm.errors import CannotCreate

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
SUBJECTS = {"mpi", "threads", "software", "sums", "cores", "gpu", "speed", "reading", "locks", "space", "quota", "shm"}


def findings_of(text, subject, level="failure"):
    return [f for f in json.loads(text)["findings"] if (f["subject"], f["level"]) == (subject, level)]


def test_one_healthy_process_gets_a_line_a_finding_and_exit_code_0(mpirun, tmp_path):
    done = mpirun(1, ["-m", "hpcllm", "doctor", "--folder", tmp_path], env=OFFLINE)
    *lines, last = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning", "FAILURE"}
    assert {line.split()[1] for line in lines} == SUBJECTS | {"caches"}
    assert "1 rank on 1 host" in lines[0] and "libmpi" in lines[0] and "; cure: " in lines[0]
    assert last.startswith("doctor: ") and ", 0 failures in " in last
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


PINNED = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from hpcllm.__main__ import main
main()
"""


@pytest.mark.skipif(os.cpu_count() < 2, reason="on one core ranks can but share it")
def test_two_ranks_pinned_on_one_core_are_a_failure(mpirun, tmp_path):
    arguments = ["--folder", tmp_path, "--json", "--exclude-file", tmp_path / "bad", "--plot", tmp_path / "a.png"]
    env = {"MPI4PY_RC_THREAD_LEVEL": "funneled", "TRANSFORMERS_OFFLINE": "0"}
    done = mpirun(2, ["-c", PINNED, "doctor", *arguments], env=env)
    assert done.returncode == doctor.UNFIT, done.stderr
    told = json.loads(done.stdout)
    (pinned,) = findings_of(done.stdout, "cores")
    core = min(os.sched_getaffinity(0))
    assert f"ranks 0-1 on {told['facts']['hosts'][0]['host']} have core {core} between them" in pinned["sentence"]
    assert "--bind-to core" in pinned["cure"]
    assert (tmp_path / "bad").read_text() == "\n"  # not the host's fault
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len(told["facts"]["links"]) == 1 and told["facts"]["between"] == "rank"
    # Ranks that take turns say nothing about the machine's speed.
    assert not findings_of(done.stdout, "speed")
    (threads,) = findings_of(done.stdout, "threads", "warning")
    assert "MPI_THREAD_FUNNELED to ranks 0-1" in threads["sentence"]
    (caches,) = findings_of(done.stdout, "caches", "warning")
    assert "TRANSFORMERS_OFFLINE not set" in caches["sentence"]  # although the command sets it for itself


def test_a_sick_host_is_found_by_comparison_and_excluded(mpirun, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    script = Path(__file__).with_name("sick_host.py")
    done = mpirun(3, [script, folder, tmp_path / "bad", tmp_path / "a.png"], env=OFFLINE)
    assert done.returncode == doctor.UNFIT, done.stderr
    assert "n1" in (tmp_path / "bad").read_text().strip().split(",")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    expected = {
        "speed": "n1 is slow: fp32 matrix products of rank 1 at",
        "sums": "all_reduce of bfloat16 adds up wrongly",
        "software": "the ranks have different versions of hpcllm: 0.1.0 on ranks 0, 2; 0.0.0 on rank 1",
        "clocks": "clocks differ on n1: n1 is 10 s ahead of n",
    }
    if "not provoked" not in done.stderr:
        expected["folder"] = f"{folder} is not the same folder everywhere: what n0 wrote is not there on n1"
        expected["shm"] = "too little on n1"
    for subject, words in expected.items():
        sentences = [finding["sentence"] for finding in findings_of(done.stdout, subject)]
        assert any(words in sentence for sentence in sentences), (subject, sentences)
    (caches,) = findings_of(done.stdout, "caches", "warning")
    assert "cannot be written to on n1" in caches["sentence"]
    facts = json.loads(done.stdout)["facts"]
    assert facts["places"] == ["n0", "n1", "n2"] and len(facts["links"]) == 3
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--folder", "nowhere"], 66, "--folder nowhere is not a folder"),
        (["--plot", "picture.png"], 2, "--plot needs matplotlib: pip install 'hpcllm[plots]'"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_sentence(mpirun, tmp_path, arguments, code, words):
    script = "import sys\nfrom hpcllm.__main__ import main\n"
    if "needs matplotlib" in words:
        script += "sys.modules['matplotlib'] = None\n"
    done = mpirun(2, ["-c", f"{script}main()", "doctor", *arguments], cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.count("hpcllm: error: ") == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_outputs_in_the_way_or_nowhere_are_refused(tmp_path):
    doctor.check(tmp_path, None, tmp_path / "new")
    for path in (tmp_path, tmp_path / "nowhere" / "bad"):
        with pytest.raises(CannotCreate, match=f"--exclude-file {path}: it is a folder, or its folder is missing"):
            doctor.check(tmp_path, None, path)


def test_lone_worlds_are_refused_with_the_path_of_libmpi():
    """As `srun --mpi=none`: the launcher tells of 4 processes, and MPI of one."""
    env = clean_environment(PMI_SIZE="4", PMI_RANK="0", PMIX_RANK="")
    env.pop("PMIX_RANK")
    command = [sys.executable, "-m", "hpcllm", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2
    assert "started 4 processes (PMI_SIZE=4), but MPI sees a world of 1" in done.stderr
    assert "libmpi" in done.stderr and "cure: " in done.stderr

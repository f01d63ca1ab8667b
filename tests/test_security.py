"""What SECURITY.md says: no program from files, no shell, private while it is written, no secret anywhere."""

import ast
import os
import stat
import tomllib
from pathlib import Path

import pytest
import tomli_w
from audit import judge
from launching import ROOT

from hpcllm import files
from hpcllm.data import scratch

SOURCES = sorted((ROOT / "hpcllm").rglob("*.py"))
PROGRAMS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml", "code", "imp"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.hub.load",
    "tempfile.mktemp",
}
CALLS |= {"yaml.load", "numpy.load", "np.load", "subprocess.getoutput", "subprocess.getstatusoutput", "os.umask"}


def unsafe(source):
    """What of a module's text would run a program from a file or a shell, or trust strangers, with line numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in PROGRAMS]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                found.append(f"{node.lineno}: {called}")
            for word in node.keywords:
                said = ast.unparse(word.value)
                odd = {"shell": said != "False", "trust_remote_code": said != "False", "allow_pickle": said != "False"}
                odd |= {"use_safetensors": said != "True", "weights_only": True}
                if odd.get(word.arg):
                    found.append(f"{node.lineno}: {word.arg}={said}")
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                named = isinstance(key, ast.Constant) and key.value in ("trust_remote_code", "shell", "allow_pickle")
                if named and ast.unparse(value) != "False":
                    found.append(f"{node.lineno}: {key.value!r}: {ast.unparse(value)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_programs_from_files_or_a_shell(path):
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from yaml import load",
        "x = eval(text)",
        "import torch\ntorch.load(path)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        'LOCAL = {"trust_remote_code": wanted}',
        "np.load(path, allow_pickle=True)",
    ],
)
def test_what_would_is_found(text):
    assert unsafe(text)


@pytest.fixture(params=[0o077, 0o027, 0o022, 0], ids=oct)
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(Path(path).stat().st_mode)


def test_what_is_written_is_private_until_it_is_whole_and_then_as_the_umask_says(mask, tmp_path):
    with files.new_folder(tmp_path / "folder") as hidden:
        assert mode(hidden) == 0o700
        (hidden / "file").write_text("x")
        (hidden / "file").chmod(0o600)  # as safetensors makes them
    made = scratch.make(str(tmp_path / "data"))
    assert mode(made) == 0o700
    scratch.publish(made, str(tmp_path / "data"), overwrite=False, check=None)
    files.write_json(tmp_path / "results.json", {})
    assert mode(tmp_path / "folder") == mode(tmp_path / "data") == 0o777 & ~mask
    assert mode(tmp_path / "folder" / "file") == mode(tmp_path / "results.json") == 0o666 & ~mask


def test_a_run_follows_the_umask_and_tells_no_secret(prepared, tmp_path, mpirun):
    secrets = {
        name: f"secret-{number}-7c1e" for number, name in enumerate(("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "X_KEY"))
    }
    values = tomllib.loads((ROOT / "slurm" / "train_bert.toml").read_text())
    values["run"]["output_dir"], values["data"] = str(tmp_path / "run"), {"train": f"{prepared}/train"}
    values["model"]["config"] |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    values["train"] |= {"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 32}
    values["train"] |= {"warmup_steps": 0}
    (tmp_path / "run.toml").write_text(tomli_w.dumps(values))
    code = "import os, sys; os.umask(0o027); from hpcllm.__main__ import main; main(sys.argv[1:])"
    done = mpirun(2, ["-c", code, "train", tmp_path / "run.toml"], env=secrets)
    assert done.returncode == 0, done.stderr
    again = mpirun(2, ["-c", code, "train", tmp_path / "run.toml", "data.train=nowhere"], env=secrets)
    broken = "import hpcllm.mpi; w = hpcllm.mpi.init(device='cpu'); 1 / (w.rank - 1)"
    crashed = mpirun(2, ["-c", broken], env=secrets)
    hangs = (
        "import time, hpcllm.mpi, torch.distributed as d; w = hpcllm.mpi.init(device='cpu'); time.sleep(30 * w.rank)"
    )
    hung = mpirun(2, ["-c", f"{hangs}; d.barrier()"], env={**secrets, "HPCLLM_TIMEOUT_S": "2"})
    assert (again.returncode, crashed.returncode, hung.returncode) == (66, 1, 124)
    told = "".join(job.stdout + job.stderr for job in (done, again, crashed, hung)).encode()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.toml", "metrics.jsonl", "events.jsonl", "trainer_state.json"} <= {path.name for path in written}
    for secret in secrets.values():
        assert secret.encode() not in told
        assert not [path for path in written if secret.encode() in path.read_bytes()]
    run = tmp_path / "run"
    assert {mode(path) for path in run.rglob("*") if path.is_file()} == {0o640}
    assert {mode(path) for path in run.rglob("*") if path.is_dir()} == {0o750}


KNOWN = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-2025-1"}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("dependencies", "code", "says"),
    [
        ([KNOWN], 0, "no vulnerabilities known of 1 packages"),
        ([KNOWN, BAD, UNKNOWN], 1, "b 2: CVE-2025-1"),
        ([KNOWN, UNKNOWN], 1, "1 were not looked up: c"),
        ([UNKNOWN], 0, "skipped: the service of vulnerabilities answered for none of 1"),
    ],
)
def test_an_audit_counts_what_was_looked_up(dependencies, code, says):
    found, sentence = judge(dependencies)
    assert found == code and says in sentence

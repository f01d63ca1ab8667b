"""`hpcllm fetch` against a small hub on this machine: what it takes, checks, and refuses."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from launching import clean_environment
from transformers import AutoConfig, AutoModelForMaskedLM

from hpcllm import fetch as fetching
from hpcllm.data import tokenizer
from hpcllm.errors import CannotCreate, DataError, IOFailure, MissingInput

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a repository of the hub holds."""
    base = tmp_path_factory.mktemp("repository")
    tokenizer.save(
        tokenizer.train("wordpiece", 60, lambda: iter(["the cat sat on the mat"] * 3)), "wordpiece", base / "m"
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=64, **sizes)).save_pretrained(base / "m")
    (base / "m" / "README.md").write_text("a card\n")
    (base / "m" / "pytorch_model.bin").write_bytes(b"a pickle")
    (base / "m" / "modeling_own.py").write_text("a program")
    return base / "m"


@pytest.fixture
def hub(folder):
    """A hub on the loopback interface; {repository: {file: bytes}} may be changed, and what it is asked is kept."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body):
            path = unquote(self.path.split("?")[0]).strip("/").split("/")
            server.asked.append(self.path)
            if path[:2] == ["api", "models"]:
                name = "/".join(path[2:4])
                files = server.repositories.get(name)
                if files is None or (len(path) > 5 and path[5] not in ("main", COMMIT)):
                    code = "RepoNotFound" if files is None else "RevisionNotFound"
                    return self.send(404, b"{}", {"X-Error-Code": code}, body)
                siblings = []
                for file, content in files.items():
                    one = {"rfilename": file, "size": len(content)}
                    if file.endswith((".safetensors", ".bin")):
                        digest = hashlib.sha256(server.promised.get(file, content)).hexdigest()
                        one["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
                    siblings.append(one)
                told = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                return self.send(200, json.dumps(told).encode(), {"Content-Type": "application/json"}, body)
            name, file = "/".join(path[:2]), "/".join(path[4:])
            content = server.repositories[name][file]
            etag = hashlib.sha256(content).hexdigest()
            return self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

        def send(self, code, content, headers, body):
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self):
            self.answer(True)

        def do_HEAD(self):
            self.answer(False)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories = {"anna/tiny": {file.name: file.read_bytes() for file in folder.iterdir()}}
    server.promised, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def asked(hub, monkeypatch):
    """`fetch` in this process, which asks `hub`."""
    from huggingface_hub import constants

    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("ENDPOINT", address_of(hub)),
        ("HUGGINGFACE_CO_URL_TEMPLATE", address_of(hub) + "/{repo_id}/resolve/{revision}/{filename}"),
    ):
        monkeypatch.setattr(constants, name, value)
    return fetching.fetch


def address_of(hub):
    return f"http://127.0.0.1:{hub.server_address[1]}"


def fetch(hub, *arguments):
    """`hpcllm fetch` as a command."""
    env = clean_environment() | {"HF_ENDPOINT": address_of(hub)}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HUB_ETAG_TIMEOUT": "5", "NO_PROXY": "127.0.0.1"}  # it is asked for all the same
    command = [sys.executable, "-m", "hpcllm", "fetch", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_model_is_fetched_whole_and_nothing_else_with_it(hub, asked, folder, tmp_path):
    done = fetch(hub, "anna/tiny", tmp_path / "tiny")
    assert done.returncode == 0, done.stderr
    found = {path.name for path in (tmp_path / "tiny").iterdir()}
    wanted = {path.name for path in folder.iterdir()} - {"pytorch_model.bin", "modeling_own.py"}
    assert found == wanted | {"fetched.json"}
    for name in wanted:
        assert (tmp_path / "tiny" / name).read_bytes() == (folder / name).read_bytes()
    said = json.loads((tmp_path / "tiny" / "fetched.json").read_text())
    assert (said["name"], said["revision"]) == ("anna/tiny", COMMIT) and set(said["files"]) == wanted
    assert said["files"]["model.safetensors"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads(done.stdout[done.stdout.index("{") :])["files"] == len(wanted)
    assert not any("pytorch_model" in path or "modeling" in path for path in hub.asked)
    assert os.listdir(tmp_path) == ["tiny"]
    AutoModelForMaskedLM.from_pretrained(tmp_path / "tiny", local_files_only=True)
    # What is there stays, unless it was fetched and is to be replaced.
    with pytest.raises(CannotCreate, match="exists; choose another name or --overwrite"):
        asked("anna/tiny", tmp_path / "tiny")
    assert asked("anna/tiny", tmp_path / "tiny", "main", overwrite=True)["revision"] == COMMIT
    (tmp_path / "tiny" / "fetched.json").unlink()
    with pytest.raises(CannotCreate, match="exists"):
        asked("anna/tiny", tmp_path / "tiny", overwrite=True)


def spoil(hub, how):
    files = hub.repositories["anna/tiny"]
    if how == "pickles":
        del files["model.safetensors"]
    elif how == "nothing":
        del files["model.safetensors"], files["pytorch_model.bin"]
    elif how == "no configuration":
        del files["config.json"]
    elif how == "damaged":
        hub.promised["model.safetensors"] = b"other bytes"
    elif how == "program":
        files["config.json"] = json.dumps(
            json.loads(files["config.json"]) | {"auto_map": {"AutoModel": "own.Own"}}
        ).encode()
    elif how == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            del files[name]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("pickles", "has weights in pytorch_model.bin only; hpcllm reads safetensors"),
        ("nothing", "has no weights; hpcllm reads safetensors"),
        ("no configuration", "has no config.json and so is no model of transformers"),
        ("damaged", "model.safetensors is not what the hub says that it is"),
        ("program", "needs a program of its own"),
        ("no tokenizer", "holds no tokenizer"),
    ],
)
def test_what_cannot_be_used_is_refused_and_leaves_nothing(hub, asked, tmp_path, how, said):
    spoil(hub, how)
    with pytest.raises(DataError, match=re.escape(said)):
        asked("anna/tiny", tmp_path / "tiny")
    assert os.listdir(tmp_path) == []


def test_what_the_hub_does_not_have_is_said(hub, asked, tmp_path):
    with pytest.raises(MissingInput, match=r"anna/none: http://127.*has no such model"):
        asked("anna/none", tmp_path / "x")
    with pytest.raises(MissingInput, match="no such model"):
        asked("not a name", tmp_path / "x")
    with pytest.raises(MissingInput, match=r"anna/tiny at old: .* has the model, but not that of it"):
        asked("anna/tiny", tmp_path / "x", "old")
    with pytest.raises(CannotCreate, match="there is no folder to write it in"):
        asked("anna/tiny", Path("nowhere") / "x")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(IOFailure, match="does not answer as it should"):
        asked("anna/tiny", tmp_path / "x")
    assert os.listdir(tmp_path) == []

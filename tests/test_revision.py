"""The commit that hpcllm runs from, found without git."""

import os
import subprocess
from types import SimpleNamespace

import pytest

from hpcllm import revision


@pytest.fixture(autouse=True)
def _not_known():
    revision.of_code.cache_clear()
    yield
    revision.of_code.cache_clear()


def git(folder, *words):
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}  # no one's signatures and hooks
    command = ["git", *who, "-C", folder, *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of one commit, from which hpcllm seems to run."""
    folder = tmp_path / "tree"
    folder.mkdir()
    git(folder, "init", "-q")
    git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    monkeypatch.setattr(revision, "__file__", str(folder / "hpcllm" / "revision.py"))
    return folder


@pytest.mark.parametrize("how", ["branch", "packed", "detached", "worktree"])
def test_it_is_what_git_says(tree, monkeypatch, how):
    if how == "packed":
        git(tree, "pack-refs", "--all")
    elif how == "detached":
        git(tree, "checkout", "-q", "--detach")
    elif how == "worktree":
        git(tree, "worktree", "add", "-q", "-b", "other", tree.parent / "other")
        git(tree.parent / "other", "commit", "-q", "--allow-empty", "-m", "second")
        tree = tree.parent / "other"
        monkeypatch.setattr(revision, "__file__", str(tree / "hpcllm" / "revision.py"))
    assert revision.of_code() == git(tree, "rev-parse", "HEAD")


def test_it_is_what_pip_has_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(revision, "__file__", str(tmp_path / "site-packages" / "hpcllm" / "revision.py"))
    told = ['{"url": "https://a/b", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}', '{"url": "file:///a"}', None]
    monkeypatch.setattr(revision.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: told[0]))
    assert revision.of_code() == "0123abc"
    for _ in told[1:]:
        told.pop(0)
        revision.of_code.cache_clear()
        assert revision.of_code() is None


def test_a_tree_without_a_commit_has_none(tree):
    (tree / ".git" / "HEAD").write_text("ref: refs/heads/never\n")
    assert revision.of_code() is None

"""Which commit of its source the running hpcllm is: so one knows years later what has made a checkpoint."""

import functools
import json
from importlib import metadata
from pathlib import Path


@functools.cache
def of_code():
    """The commit's name (hex): that which pip has installed, or of the working tree around this file; None if unknown.

    Read from files, since git may not be there on a node, and processes with MPI are better not forked.
    """
    try:
        return _of_tree(Path(__file__).parents[1] / ".git") or _installed()
    except (OSError, ValueError, KeyError, TypeError, metadata.PackageNotFoundError):
        return None


def _of_tree(git):
    """What HEAD is in a folder .git, or where the file .git of a further working tree leads (gitrepository-layout)."""
    if git.is_file():
        git = git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
    if not git.is_dir():
        return None
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref: "):
        return head
    name, common = head.removeprefix("ref: "), git
    if (git / "commondir").is_file():
        common = git / (git / "commondir").read_text(encoding="utf-8").strip()
    if (common / name).is_file():
        return (common / name).read_text(encoding="utf-8").strip()
    packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)


def _installed():
    """What PEP 610 has pip write where it was told a repository."""
    told = metadata.distribution("hpcllm").read_text("direct_url.json")
    return json.loads(told)["vcs_info"]["commit_id"] if told else None

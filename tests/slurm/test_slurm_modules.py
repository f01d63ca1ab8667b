"""Claims about the module file, under Environment Modules and under Lmod, each in a bash of its own."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = os.environ.get("HPCLLM_MODULE_TOOLS", "")  # both tools, unpacked by run.sh
INIT = {
    "Environment Modules": f"{TOOLS}/environment-modules/usr/share/modules/init/bash",
    "Lmod": f"{TOOLS}/lmod/usr/share/lmod/lmod/init/bash",
}
# What the tools write down for themselves: names of loaded modules, reference counts.
BOOKKEEPING = re.compile(r"LOADEDMODULES|_LMFILES_|__MODULES_\w+|__LMOD_REF_COUNT_\w+|_ModuleTable\w+|_")

pytestmark = [pytest.mark.slurm, pytest.mark.parametrize("tool", INIT)]


def bash(tool, script, root=ROOT, **env):
    """Run `script` where the module command works and hpcllm's module file is found; returns the process."""
    start = f"set -e; . {shlex.quote(INIT[tool])}; module use {shlex.quote(str(root / 'modules'))}\n"
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-c", start + script],
        capture_output=True,
        text=True,
        timeout=60,
        env={"HOME": "/nowhere", "PATH": "/usr/bin:/bin", "MANPATH": "/usr/share/man", **env},
        stdin=subprocess.DEVNULL,
    )


def environments(tool, script, **options):
    """The environment, as {name: value}, at each `snap` in the script."""
    snap = "snap() { env -0; printf 'end-of-snapshot\\0'; }\n"
    done = bash(tool, snap + script, **options)
    assert (done.returncode, done.stderr) == (0, "")
    found = [{}]
    for line in done.stdout.split("\0")[:-1]:
        if line == "end-of-snapshot":
            found.append({})
        else:
            name, _, value = line.partition("=")
            if not BOOKKEEPING.fullmatch(name):
                found[-1][name] = value
    return found[:-1]


def test_load_and_unload_leave_the_environment_identical(tool):
    before, loaded, after = environments(tool, "snap; module load hpcllm; snap; module unload hpcllm; snap")
    assert after == before
    changed = {name: loaded[name] for name in loaded if loaded[name] != before.get(name)}
    assert changed.pop("PATH") == f"{ROOT}/.venv/bin:/usr/bin:/bin"
    assert changed == {
        "HPCLLM_ROOT": str(ROOT),
        "HPCLLM_MODULE_SET": "HDF5_USE_FILE_LOCKING:HF_HUB_OFFLINE:TRANSFORMERS_OFFLINE:HF_HUB_DISABLE_TELEMETRY",
        "HDF5_USE_FILE_LOCKING": "FALSE",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def test_variables_that_the_user_has_set_stay_as_they_are(tool):
    mine = {
        "HDF5_USE_FILE_LOCKING": "TRUE",
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "",
        "HF_HUB_DISABLE_TELEMETRY": "0",
    }
    script = "snap; module load hpcllm; snap; module unload hpcllm; snap"
    before, loaded, after = environments(tool, script, **mine)
    assert {name: loaded[name] for name in mine} == mine
    assert after == before
    mine.pop("HF_HUB_OFFLINE")
    before, loaded, after = environments(tool, script, **mine)
    assert loaded["HF_HUB_OFFLINE"] == "1" and loaded["HDF5_USE_FILE_LOCKING"] == "TRUE"
    assert after == before


def test_loading_twice_and_purging_leave_nothing(tool):
    before, once, twice, after = environments(
        tool, "snap; module load hpcllm; snap; module load hpcllm; snap; module purge; snap"
    )
    assert twice == once != before
    assert after == before


def test_the_module_offers_the_command_of_its_own_installation(tool):
    done = bash(tool, "module load hpcllm; command -v hpcllm; hpcllm --help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{ROOT}/.venv/bin/hpcllm\n") and "train" in done.stdout


def test_a_link_in_the_module_tree_of_a_centre_finds_the_installation(tool, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/hpcllm").symlink_to(ROOT / "modules/hpcllm")
    done = bash(tool, "module load hpcllm; echo $HPCLLM_ROOT", root=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{ROOT}\n")
    (tmp_path / "modules/hpcllm").unlink()
    (tmp_path / "modules/hpcllm").mkdir()
    (tmp_path / "modules/hpcllm/0.1.0").symlink_to(ROOT / "modules/hpcllm/0.1.0")
    done = bash(tool, "module load hpcllm; echo $HPCLLM_ROOT", root=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{ROOT}\n")


def test_without_an_installation_loading_fails_and_names_the_cure(tool, tmp_path):
    shutil.copytree(ROOT / "modules", tmp_path / "clone/modules")
    done = bash(tool, "module load hpcllm || echo refused; echo [$HPCLLM_ROOT]", root=tmp_path / "clone")
    assert "make venv" in " ".join(done.stderr.split())
    assert done.stdout == "refused\n[]\n"


def test_help_and_whatis_say_what_it_is(tool):
    done = bash(tool, "module help hpcllm; module whatis hpcllm; module show hpcllm")
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert "slurm/site.sh" in shown and "hpcllm 0.1.0:" in shown
    assert "LD_LIBRARY_PATH" not in shown

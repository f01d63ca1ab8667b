"""transformers is imported as ever, but looks into its files once per machine and not in every process."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
if sys.argv[1] == "remember":
    from hpcllm import imports
    imports.remember()
    imports.remember()
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
import transformers.models
looked_into = sum("/transformers/models/" in path and path.endswith(".py") for path in opened)
told = {
    "looked_into": looked_into,
    "names": sorted(dir(transformers)),
    "where": transformers._class_to_module,
    "models": sorted(dir(transformers.models)),
    "left": [type(finder).__module__ for finder in sys.meta_path if type(finder).__module__ == "hpcllm.imports"],
}
print(json.dumps(told))
"""


def imported(how, cache):
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_kept_is_what_transformers_finds(tmp_path):
    plain = imported("as ever", tmp_path)
    assert plain.pop("looked_into") > 1500 and not list(tmp_path.iterdir())
    first, again = (imported("remember", tmp_path) for _ in range(2))
    assert first.pop("looked_into") > 1500
    assert again.pop("looked_into") < 100
    assert first == again == plain
    (file,) = (tmp_path / "hpcllm").iterdir()
    file.write_text(file.read_text()[:1000])
    assert imported("remember", tmp_path).pop("looked_into") > 1500
    assert imported("remember", tmp_path).pop("looked_into") < 100


@pytest.mark.parametrize("place", ["file", "nowhere"])
def test_where_nothing_can_be_kept_it_is_found_out_each_time(tmp_path, place):
    (tmp_path / "file").write_text("")
    told = imported("remember", tmp_path / "file" if place == "file" else "/proc/none")
    assert told["looked_into"] > 1500 and told["where"]["GPT2LMHeadModel"]


def said(program):
    """What a new Python prints that runs `program`, errors after the rest."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return done.stdout + done.stderr * (done.returncode != 0)


def test_the_garbage_collector_looks_at_what_comes_after_imports_alone():
    program = (
        "import gc\nfrom hpcllm import imports\n"
        "try:\n    with imports.undisturbed():\n        assert not gc.isenabled()\n        import no_such_module\n"
        "except ImportError:\n    print(gc.isenabled(), gc.get_freeze_count() > 5000, len(gc.get_objects()) < 500)"
    )
    assert said(program) == "True True True\n"


def test_scipy_is_not_imported_for_losses_that_no_task_has_and_is_there_for_what_needs_it():
    pytest.importorskip("scipy")
    program = (
        "import sys\nfrom hpcllm import imports\nimports.remember()\n"
        "with imports.undisturbed():\n    import transformers.modeling_utils\n"
        "print('scipy' in sys.modules, transformers.utils.is_scipy_available())"
    )
    assert said(program) == "False True\n"

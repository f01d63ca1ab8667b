"""Claims about README.md and docs/: links lead somewhere, commands have the options, run files are those of slurm/."""

import re
import tomllib

import pytest
from launching import ROOT

from hpcllm import config
from hpcllm.arguments import parser

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")])
TASKS = sorted((ROOT / "docs" / "tasks").glob("*.md"))
FINE_TUNING = [ROOT / "docs" / "fine_tuning.md", ROOT / "docs" / "predict.md", *TASKS]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    assert not [link for link in links if "://" not in link and not (document.parent / link).exists()]


@pytest.mark.parametrize("document", TASKS, ids=lambda document: document.name)
def test_the_run_file_of_a_task_is_that_of_its_job_script_where_it_has_one(document):
    [shown] = re.findall(r"```toml\n(.*?)```", document.read_text(), re.DOTALL)
    for name in set(re.findall(r"slurm/(finetune_\w+)\.toml\)", document.read_text())):
        assert tomllib.loads(shown) == tomllib.loads((ROOT / "slurm" / f"{name}.toml").read_text())
    assert config.load(tomllib.loads(shown)).model.task == document.stem


def test_what_is_told_of_lora_is_a_run_file_and_all_of_its_keys():
    [shown] = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "fine_tuning.md").read_text(), re.DOTALL)
    assert config.load(tomllib.loads(shown)).lora.r == 16
    told = re.findall(r"^\| `(\w+)(?: = [^`]+)?` \|", (ROOT / "docs" / "fine_tuning.md").read_text(), re.MULTILINE)
    assert set(config.Lora.model_fields) <= set(told)


@pytest.mark.parametrize("document", FINE_TUNING, ids=lambda document: document.name)
def test_commands_have_the_options_that_are_told_of_them(document):
    commands = parser()._subparsers._group_actions[0].choices
    known = {
        option
        for name in ("prepare", "train", "evaluate", "predict", "export")
        for option in commands[name]._option_string_actions
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text())) <= known


@pytest.mark.parametrize("document", FINE_TUNING, ids=lambda document: document.name)
def test_run_files_have_the_keys_that_are_told_of_them(document):
    for section, key in re.findall(r"\b(run|data|model|parallel|train|checkpoint)\.([a-z_]+)\b", document.read_text()):
        # Names of files are no keys.
        if key not in ("conll", "tsv", "csv", "json", "jsonl", "dat", "safetensors"):
            assert key in config.Config.model_fields[section].annotation.model_fields, f"{section}.{key}"

"""Checkpoints: a folder `checkpoint-<step>` in Hugging Face's layout, with everything a run needs to go on.

config.json, model.safetensors, tokenizer files: `from_pretrained` loads the folder as it is. optimizer.safetensors and
trainer_state.json: optimizer moments by parameter name, step, samples consumed. Order, masking, dropout and learning
rate are functions of seed and position, so nothing else has state. `.complete` names every file with size and SHA-256
and is written last; a folder without it does not count. Root writes; every rank reads.
"""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import __version__, files
from .errors import DataError, IOFailure

COMPLETE = ".complete"
# What Hugging Face's tokenizers are made of; their folder may also hold a model, which is not copied.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)


def save(output_dir, step, model, optimizer, tokenizer_dir, state, keep):
    """Write `checkpoint-<step>` below `output_dir`, then delete all but the newest `keep`; returns its path.

    state: JSON-able dict that `read_state` gives back. To be called on root alone. Raises IOFailure; the checkpoints
    that were there stay.
    """
    path = Path(output_dir) / f"checkpoint-{step}"
    if path.exists():
        files.remove_folder(path)  # the same step again after a restart from an older checkpoint
    with _safetensors_as_io(path), files.new_folder(path) as folder:
        model.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(Path(tokenizer_dir) / name, folder / name)
        tensors = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, values in _by_name(model, optimizer).items()
            for key, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, folder / "optimizer.safetensors")
        files.write_json(folder / "trainer_state.json", {"step": step, "hpcllm": __version__, **state})
        listed = {
            file.name: {"bytes": file.stat().st_size, "sha256": files.digest(file)}
            for file in sorted(folder.iterdir())
            if file.is_file()
        }
        files.write_json(folder / COMPLETE, {"files": listed})
    for old in find(output_dir)[:-keep]:
        files.remove_folder(old)
    return path


@contextmanager
def _safetensors_as_io(path):
    """A full disk reaches us from safetensors as an error of its own."""
    try:
        yield
    except SafetensorError as error:
        raise IOFailure(f"{path}: {error}") from error


def _by_name(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: values for parameter, values in optimizer.state.items()}


def find(output_dir):
    """Complete checkpoints below `output_dir`, oldest step first (never by time stamps: clocks lie)."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (path / COMPLETE).is_file():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def remove_unfinished(output_dir):
    """Delete what saves that were killed in the middle have left below `output_dir`, which one run owns."""
    for pattern in (".checkpoint-*.tmp", ".checkpoint-*.removed"):
        for folder in Path(output_dir).glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def verify(path):
    """Raise DataError, naming the file, unless every file of a checkpoint has its recorded size and digest."""
    path = Path(path)
    try:
        listed = json.loads((path / COMPLETE).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a complete checkpoint: {COMPLETE} cannot be read ({error})") from None
    for name, (size, sha256) in expected.items():
        file = path / name
        if "/" in name or not file.is_file():
            raise DataError(f"{path}: {name} is missing")
        if file.stat().st_size != size:
            raise DataError(f"{file}: {file.stat().st_size} bytes, but {size} were written")
        if files.digest(file) != sha256:
            raise DataError(f"{file}: its contents are not what was written (SHA-256 differs)")


def read_state(path):
    """The dict that `save` was given, with `step`."""
    try:
        return json.loads((Path(path) / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: trainer_state.json cannot be read: {error}") from None


def load_optimizer(path, model, optimizer):
    """Give `optimizer` the state saved for the parameters of `model`, bit for bit."""
    parameters = dict(model.named_parameters())
    file = Path(path) / "optimizer.safetensors"
    try:
        with safe_open(file, framework="pt") as saved:
            for entry in saved.keys():  # noqa: SIM118 (not a dict)
                name, _, key = entry.rpartition(".")
                value = saved.get_tensor(entry)
                if name not in parameters:
                    raise DataError(f"{file}: state for {name}, which this model does not have")
                # `step` stays where torch's optimizers want it: beside the parameter when fused.
                optimizer.state[parameters[name]][key] = value.to(parameters[name].device, copy=True)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None

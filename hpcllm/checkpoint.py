"""Checkpoints: a folder `checkpoint-<step>` in Hugging Face's layout, with everything a run needs to go on.

config.json, model.safetensors, tokenizer files: `from_pretrained` loads the folder as it is (of a run with LoRA only
hpcllm does: see `lora`). optimizer.safetensors and trainer_state.json: optimizer moments by parameter name, step,
samples consumed. Order, masking, dropout and learning rate are functions of seed and position, so nothing else has
state. `.complete` names every file with size and SHA-256 and is written last; a folder without it does not count.

No layout: the tensors in the files are those of the whole model, each rank writes and reads its pieces of them, and a
run goes on under any other layout.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from . import __version__, files, lora, tensors
from .data import tokenizer
from .errors import DataError
from .model import class_name
from .mpi import on_root, together
from .parallel.pieces import Piece
from .parallel.sharding import local

COMPLETE, OPTIMIZER = ".complete", "optimizer.safetensors"


def save(comm, output_dir, step, placed, optimizer, tokenizer_dir, state, keep, best=None):
    """Write `checkpoint-<step>` below `output_dir`, then delete all but the newest `keep`, and that of step `best`.

    Returns its path.

    placed: parallel.apply.Placed; every rank writes its pieces, and the files are those that one rank would write.
    state: JSON-able dict that `read_state` gives back. Collective over `comm`. Raises IOFailure, the same on every
    rank; the checkpoints that were there stay.
    """
    path = Path(output_dir) / f"checkpoint-{step}"
    placed.reshard()
    weights = lora.WEIGHTS if hasattr(placed.model, "lora") else lora.PLAIN
    contents = {weights: _weights(placed), OPTIMIZER: _moments(placed, optimizer)}
    outlines = {file: _outline(placed, held) for file, held in contents.items()}
    hidden = on_root(comm, _begin, path, outlines)
    try:
        with together(comm), files.failing_as_io(path):
            for file, held in contents.items():
                _write_pieces(hidden / file, outlines[file], held, placed)
        on_root(comm, _finish, hidden, path, step, placed, tokenizer_dir, state)
    except BaseException:
        if comm.rank == 0:
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    on_root(comm, _delete_older, output_dir, keep, best)
    return path


def _weights(placed):
    """{name of entry: (name of the parameter, Piece, tensor)} of what this rank has."""
    return {name: (name, placed.pieces[name], parameter) for name, parameter in placed.named_parameters()}


def _moments(placed, optimizer):
    """As `_weights`, of the optimizer's state: tensors cut as their parameters are, and numbers."""
    found = {}
    for name, parameter in placed.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                whole = value.shape == parameter.shape
                found[f"{name}.{key}"] = name, placed.pieces[name] if whole else Piece(value.shape), value
    if any(optimizer.state.values()) and not found:
        raise RuntimeError("the optimizer's state belongs to no parameter of the model: it would be lost")
    return found


def _outline(placed, held):
    """Where everything goes, of this and of the other stages. Collective over the pipeline."""
    mine = {entry: (tensor.dtype, piece.shape) for entry, (_, piece, tensor) in held.items()}
    stages = [mine]
    if placed.mesh.layout.pipeline > 1:
        stages = [None] * placed.mesh.layout.pipeline
        dist.all_gather_object(stages, mine, group=placed.mesh["pipeline"])
    return tensors.Outline({entry: what for stage in stages for entry, what in stage.items()})


def _begin(path, outlines):
    with files.failing_as_io(path):
        if path.exists():
            files.remove_folder(path)  # the same step again after a restart from an older checkpoint
        hidden = files.hidden_folder(path)
        try:
            for file, outline in outlines.items():
                outline.create(hidden / file)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        return hidden


def _write_pieces(file, outline, held, placed):
    handle = os.open(file, os.O_WRONLY)
    try:
        for number, (entry, (name, piece, tensor)) in enumerate(held.items()):
            if placed.writes(name, piece, number):
                for box, values in placed.boxes(piece, tensor):
                    outline.write(handle, entry, box, values)
        os.fsync(handle)
    finally:
        os.close(handle)


def _finish(hidden, path, step, placed, tokenizer_dir, state):
    """What is not made of pieces, and the rename. Root only."""
    with files.failing_as_io(path):
        config, model = placed.config, placed.model
        config.architectures = [class_name(model)]
        config.dtype = "float32"
        config.save_pretrained(hidden)
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            # As it came: transformers' own way to save refuses what some published models have in it.
            model.generation_config.to_json_file(hidden / "generation_config.json")
        if hasattr(model, "lora"):
            files.write_json(hidden / lora.SETTINGS, model.lora)
        for name in tokenizer.FILES:  # the folder may also hold a model
            if (Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(Path(tokenizer_dir) / name, hidden / name)
        files.write_json(hidden / "trainer_state.json", {"step": step, "hpcllm": __version__, **state})
        listed = {
            file.name: {"bytes": file.stat().st_size, "sha256": files.digest(file)}
            for file in sorted(hidden.iterdir())
            if file.is_file()
        }
        files.write_json(hidden / COMPLETE, {"files": listed})
        files.reveal(hidden, path)


def _delete_older(output_dir, keep, best):
    for old in find(output_dir)[:-keep]:
        if old.name != f"checkpoint-{best}":
            files.remove_folder(old)


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


def load_optimizer(path, placed, optimizer):
    """Give `optimizer` the state saved for the parameters of `placed`, bit for bit, whatever layout it was saved under.

    Every rank reads its own pieces.
    """
    parameters = dict(placed.named_parameters())
    file = Path(path) / OPTIMIZER
    try:
        with safe_open(file, framework="pt") as saved:
            if isinstance(optimizer, torch.optim.AdamW) and not saved.keys():
                raise DataError(f"{file} holds no state of the optimizer")
            for entry in saved.keys():  # noqa: SIM118 (not a dict)
                name, _, key = entry.rpartition(".")
                parameter = parameters.get(name)
                if name not in placed.pieces:
                    raise DataError(f"{file}: state for {name}, which this model does not have")
                if parameter is None:  # another stage's
                    continue
                shape = torch.Size(saved.get_slice(entry).get_shape())
                if shape == placed.pieces[name].shape:
                    value = torch.empty_like(parameter, requires_grad=False)
                    tensors.read(saved, entry, placed.places(placed.pieces[name], value), local(value))
                else:
                    # `step` stays where torch's optimizers want it: beside the parameter when fused.
                    value = saved.get_tensor(entry).to(local(parameter).device, copy=True)
                optimizer.state[parameter][key] = value
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None

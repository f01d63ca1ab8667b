"""Checkpoints: a folder `checkpoint-<step>` in Hugging Face's layout, with everything a run needs to go on.

config.json, model.safetensors, tokenizer files: `from_pretrained` loads the folder as it is (of a run with LoRA only
hpcllm does: see `lora`). optimizer.safetensors and trainer_state.json: optimizer moments by parameter name, step,
samples consumed. Order, masking, dropout and learning rate are functions of seed and position, so nothing else has
state. `.complete` names every file with size and SHA-256 and is written last; a folder without it does not count. A
link `latest` beside the folders leads to the newest, for people and their scripts: nothing here reads it.

No layout: the tensors in the files are those of the whole model, each rank writes and reads its pieces of them, and a
run goes on under any other layout.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from . import __version__, blocks, files, lora, revision, tensors
from .data import tokenizer
from .errors import DataError, IOFailure
from .model import class_name
from .parallel.pieces import Piece
from .parallel.sharding import local
from .records import COMPLETE
from .records import checkpoints as find
from .records import step_of as step_of  # whoever deals with checkpoints looks for it here

# What reading a marker fails with that is not there, or is not what was written; not what a file system fails with.
_DAMAGED = (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError)
_DAMAGED += (OverflowError, RecursionError)
OPTIMIZER, STATE = "optimizer.safetensors", "trainer_state.json"
LATEST = "latest"
_OLD_BLOCK_BYTES = 1 << 26  # what a digest of a large file was for before markers said so


def contents(placed, optimizer):
    """{file: {name of entry: (name of the parameter, Piece, tensor)}} of what this rank has of a checkpoint.

    placed: parallel.apply.Placed; every rank writes its pieces, and the files are those that one rank would write.
    """
    weights = lora.WEIGHTS if hasattr(placed.model, "lora") else lora.PLAIN
    return {weights: _weights(placed), OPTIMIZER: _moments(placed, optimizer)}


def stretches(placed, held, outline):
    """(offset, uint8 tensor) of the bytes that this rank writes of a file's contents; see `blocks`."""
    for entry, (name, piece, tensor) in held.items():
        copies, mine = placed.copies(name, piece)
        for box, values in placed.boxes(piece, tensor.detach()) if copies else ():
            for offset, part in outline.stretches(entry, box, values):
                yield from blocks.share(offset, part, outline.size_bytes, copies, mine)


def size_bytes(placed, plan):
    """Of a checkpoint's tensors, those of all ranks. plan: the run file's [train]."""
    moments = 2 if plan.optimizer == "adamw" else 1 if plan.sgd_momentum else 0
    frozen = {name for name, parameter in placed.named_parameters() if not parameter.requires_grad}
    return sum(4 * piece.shape.numel() * (1 + moments * (name not in frozen)) for name, piece in placed.pieces.items())


def require_room(output_dir, size_bytes):
    """Raise IOFailure where so much cannot be written to `output_dir`: its disk is full, or a quota would be exceeded.

    Seen by making such a file, which is removed: what is free of a file system says nothing of quotas. Root only.
    """
    try:
        with tempfile.TemporaryFile(dir=output_dir) as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
    except OSError as error:
        needed = f"a checkpoint of {size_bytes / 1e9:.3g} GB"
        raise IOFailure(f"run.output_dir: {output_dir} has no room for {needed}: {error.strerror}") from None


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


def outline(placed, held):
    """Where everything goes, of this and of the other stages. Collective over the pipeline."""
    mine = {entry: (tensor.dtype, piece.shape) for entry, (_, piece, tensor) in held.items()}
    stages = [mine]
    if placed.mesh.layout.pipeline > 1:
        stages = [None] * placed.mesh.layout.pipeline
        dist.all_gather_object(stages, mine, group=placed.mesh["pipeline"])
    return tensors.Outline({entry: what for stage in stages for entry, what in stage.items()})


def begin(path, outlines):
    """The hidden folder that becomes `path`, with files of the full length. Root only."""
    with files.failing_as_io(path):
        hidden = files.hidden_folder(path)
        try:
            for file, outline in outlines.items():
                outline.create(hidden / file)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        return hidden


def unread(hidden, known, rank, size):
    """{file: numbers of blocks} of the large files that this rank is to read for their digests.

    known: {file: numbers of the blocks whose digests are known}, of each rank.
    """
    found = {}
    for name in known[rank]:
        those = set().union(*(each[name] for each in known))
        left = [n for n in range(blocks.count((hidden / name).stat().st_size)) if n not in those]
        found[name] = left[rank::size]
    return found


def tokenizer_files(folder):
    """{name: bytes} of the tokenizer in a folder, which may also hold a model. Raises IOFailure."""
    with files.failing_as_io(folder):
        return {name: (Path(folder) / name).read_bytes() for name in tokenizer.FILES if (Path(folder) / name).is_file()}


def finish(hidden, path, step, placed, words, state, known):
    """Write what is not made of pieces, the digests, and give the folder its name. Root only.

    words: of `tokenizer_files`; known: {file: {number of a block: its digest}} of each rank, all blocks of the large
    files between them.
    """
    with files.failing_as_io(path):
        config, model = placed.config, placed.model
        config.architectures = [class_name(model)]
        config.dtype = "float32"
        config.to_json_file(hidden / "config.json")  # save_pretrained would make a folder that has vanished anew
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            # As it came: transformers' own way to save refuses what some published models have in it.
            model.generation_config.to_json_file(hidden / "generation_config.json")
        if hasattr(model, "lora"):
            files.write_json(hidden / lora.SETTINGS, model.lora)
        for name, content in words.items():
            (hidden / name).write_bytes(content)
        of_code = {"hpcllm": __version__, "git": revision.of_code()}
        files.write_json(hidden / STATE, {"step": step, **of_code, **state})
        listed = {}
        for file in sorted(hidden.iterdir()):
            made = {number: digest for each in known for number, digest in each.get(file.name, {}).items()}
            told = [made[number] for number in range(len(made))] if made else files.digest(file)
            listed[file.name] = {"bytes": file.stat().st_size, "sha256": told}
        for name in known[0].keys() - listed.keys():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(hidden / name))
        files.write_json(hidden / COMPLETE, {"block_bytes": blocks.BLOCK_BYTES, "files": listed})
        # There may be one of this step, which is the newest: of a run that goes on with an evaluation that was due.
        files.reveal(hidden, path, replace=True)
        point(path.parent)


def point(output_dir):
    """Have `latest` lead to the newest checkpoint, where the file system has links. Root only."""
    link, new = (Path(output_dir) / name for name in (LATEST, f".{LATEST}.tmp"))
    with contextlib.suppress(OSError):
        if not (last := newest(output_dir)):
            link.unlink(missing_ok=True)
            return
        new.unlink(missing_ok=True)
        new.symlink_to(last.name)
        try:
            new.replace(link)
        finally:
            new.unlink(missing_ok=True)  # where it is a folder: of a run that was copied by what follows links
        files.sync_folder(output_dir)


def set_aside(damaged):
    """Give checkpoint folders that are not what was written other names, those that are still there. Root only."""
    for folder in filter(Path.exists, damaged):  # somebody may have moved it away
        name = folder.with_name(f"damaged-{folder.name}")
        if name.exists():
            files.remove_folder(name)
        folder.rename(name)
        point(folder.parent)


def doubt(path):
    """(the newest checkpoint's path or None, whether that of `path` is whole) after a rank has not read it as written.

    If root reads something else too it gets another name, if that can be. Root only.
    """
    with files.failing_as_io(path):
        try:
            verify(path)
            whole = True
        except (DataError, IOFailure) as error:
            whole = False
            if isinstance(error, DataError):
                with contextlib.suppress(OSError):
                    set_aside([path])
        return newest(path.parent), whole


def delete_older(output_dir, keep, best):
    """Delete all but the newest `keep` checkpoints, and that of step `best`. Root only."""
    with files.failing_as_io(output_dir):
        for old in find(output_dir)[:-keep]:
            if old.name != f"checkpoint-{best}":
                with contextlib.suppress(FileNotFoundError):  # somebody has moved it away
                    files.remove_folder(old, COMPLETE)


def newest(output_dir):
    """The newest complete checkpoint below `output_dir`, or None."""
    return next(reversed(find(output_dir)), None)


def forget(path):
    """Delete a checkpoint that no run is to go on from, not even where a kill leaves half of it. Root only."""
    (path / COMPLETE).unlink()
    files.remove_folder(path)


def rescue(output_dir):
    """Give complete checkpoints their names that a kill between two renamings has left without. Root only."""
    newest_first = sorted(Path(output_dir).glob(".checkpoint-*"), key=lambda folder: folder.suffix != ".tmp")
    for folder in newest_first:
        path = folder.with_name(".".join(folder.name.split(".")[1:2]))
        if (folder / COMPLETE).is_file() and not path.exists():
            folder.rename(path)


def remove_unfinished(output_dir):
    """Delete what saves that were killed in the middle have left below `output_dir`, which one run owns."""
    for pattern in (".checkpoint-*.tmp", ".checkpoint-*.removed"):
        for folder in Path(output_dir).glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def verify(path, share=None):
    """Raise DataError, naming the file, unless every file of a checkpoint has its recorded size and digests.

    share: (rank, size) of those who read it between them, and not again soon. Raises IOFailure where the file system
    does not let one know.
    """
    with files.failing_as_io(path):
        files.patiently(_verify, Path(path), share)


def _verify(path, share):
    rank, ranks = share or (0, 1)
    try:
        marker = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        expected = {str(name): (int(entry["bytes"]), entry["sha256"]) for name, entry in marker["files"].items()}
        block_bytes = int(marker.pop("block_bytes", _OLD_BLOCK_BYTES))
        if block_bytes.bit_count() != 1 or marker.keys() != {"files"}:  # not what was written, and who knows the rest
            raise ValueError(f"blocks of {block_bytes} bytes, and {', '.join(marker)}")
    except _DAMAGED as error:
        raise DataError(f"{path} is not a complete checkpoint: {COMPLETE} cannot be read ({error})") from None
    lacking = sorted({"config.json", STATE, OPTIMIZER} - expected.keys())
    if lacking or not {lora.PLAIN, lora.WEIGHTS} & expected.keys():
        raise DataError(f"{path} is not a complete checkpoint: {COMPLETE} names no {(lacking or [lora.PLAIN])[0]}")
    for name, (size, sha256) in expected.items():
        if rank and not isinstance(sha256, list):
            continue
        file = path / name
        if "/" in name or not file.is_file():
            raise DataError(f"{path}: {name} is missing")
        if file.stat().st_size != size:
            raise DataError(f"{file}: {file.stat().st_size} bytes, but {size} were written")
        if isinstance(sha256, list):
            mine = range(rank, blocks.count(size, block_bytes), ranks)
            found = list(blocks.digests(file, mine, block_bytes, keep=share is None).values())
            sha256 = sha256[rank::ranks]
        else:
            found = files.digest(file)
        if found != sha256:
            raise DataError(f"{file}: its contents are not what was written (SHA-256 differs)")


def read_state(path):
    """The dict that `save` was given, with `step`."""
    try:
        state = json.loads(files.patiently((Path(path) / STATE).read_bytes))
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {STATE} cannot be read: {error}") from None
    except OSError as error:
        raise IOFailure(f"{path}: {STATE} cannot be read: {error}") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise DataError(f"{path}: {STATE} names no step")
    if not isinstance(state.get("best"), dict | None):
        raise DataError(f"{path}: {STATE} says of the best checkpoint {state['best']!r}")
    return state


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
    except (FileNotFoundError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    except OSError as error:
        raise IOFailure(f"{file} cannot be read: {error}") from None

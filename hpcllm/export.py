"""A checkpoint as one folder in Hugging Face's layout, as `save_pretrained` would write it, a tensor at a time.

config.json, generation_config.json where there is one, tokenizer files, and the weights under the names and in the
shards of `save_pretrained`, with a model card, and an ONNX graph where one is asked for; no optimizer, no state of the
run.
"""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from . import card, checkpoint, files, lora, model, tensors, to_onnx, weights
from .data import tokenizer
from .errors import CannotCreate, DataError, UsageError
from .monitor import Progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_LINE_EVERY_S = 30.0


def size(text):
    """Bytes of a size in words: 500MB, 5GB (powers of 1000), 4GiB (of 1024), or a plain number. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d+)?) ?([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    count = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if count < 1:
        raise UsageError(f'--max-shard-size: "{text}" is not a size; say for example 500MB, 5GB or 4GiB')
    return count


def check(output, overwrite):
    """Refuse an output that is in the way, or has nowhere to be. Raises CannotCreate.

    overwrite: replace the folder that is there, if it holds a model and nothing that an export does not write.
    """
    path = Path(os.path.abspath(output))
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        raise CannotCreate(f"{output}: there is no folder to write it in, or it may not be written to")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CannotCreate(f"{output} exists; choose another name or --overwrite")
    if path.is_symlink() or not any((path / name).is_file() for name in (CONFIG, lora.ADAPTER_CONFIG)):
        raise CannotCreate(f"{output} is not a model folder (it has no {CONFIG}), so --overwrite leaves it alone")
    # Such a folder may be a checkpoint, or hold the one that is to be exported.
    known = {CONFIG, GENERATION, INDEX, card.NAME, to_onnx.NAME, to_onnx.DATA, *tokenizer.FILES}
    known |= {lora.ADAPTER_CONFIG, lora.ADAPTER}
    strangers = sorted(name for name in os.listdir(path) if name not in known and not _WEIGHTS.fullmatch(name))
    if strangers:
        listed = ", ".join(strangers[:5])
        raise CannotCreate(f"{output} also holds {listed}; --overwrite would delete what an export does not write")


def export(folder, task, output, dtype="fp32", max_shard_bytes=5 * 10**9, overwrite=False, onnx=False, adapter=False):
    """Write the model of the checkpoint `folder`, which has been verified, to the new folder `output`. One process.

    task: of the run that it is from. dtype: "fp32", "bf16" or "fp16"; rounds to nearest. max_shard_bytes: of the
    tensors in a file; one that is larger has a file of its own. onnx: also as a graph, where `to_onnx.check` allows it.
    adapter: of a run with LoRA, what was learnt alone, in PEFT's layout; otherwise that is added to the weights.
    Returns {"checkpoint", "output", "dtype", "files": how many, "bytes": of all files, "onnx": as `to_onnx.write`}.
    Raises a Refusal, and then leaves what was there: CannotCreate as `check`, IOFailure where the disk is full,
    DataError for weights that are not the model's or beyond the range of `dtype`, and as `to_onnx.write`, UsageError
    where there is no adapter.
    """
    check(output, overwrite)
    folder, output = Path(folder), Path(os.path.abspath(output))
    if adapter and not lora.read(folder):
        raise UsageError(f"--adapter: {folder} is of a run without [lora], which has no adapter but a whole model")
    for left in files.leftovers(output):
        print(f"export: {left} is of a job that was killed, or of one at work; delete it if none is", file=sys.stderr)
    try:
        with files.failing_as_io(folder), lora.opened(folder) as opened:
            plan = Plan(folder, task, opened, DTYPES[dtype], max_shard_bytes)
            with files.new_folder(output, replace=overwrite) as hidden:
                graph = to_onnx.write(folder, task, hidden) if onnx else None  # first: it may refuse the model
                if adapter:
                    base = checkpoint.read_state(folder)["config"]["model"]["init_from"]
                    lora.write_adapter(folder, hidden, task, base, lambda *tensor: rounded(*tensor, plan.dtype))
                else:
                    plan.write(hidden, opened)
                _write_beside(folder, hidden, None if adapter else plan)
                library = "peft" if adapter else "transformers"
                text = card.card(folder, task, dtype, plan.parameters, library, graph)
                (hidden / card.NAME).write_text(text, encoding="utf-8")
                written = [file.stat().st_size for file in hidden.iterdir()]
                check(output, overwrite)  # something may have come there while this worked
    except SafetensorError as error:
        raise DataError(f"{lora.weights_file(folder)} cannot be read: {error}") from None
    summary = {"checkpoint": str(folder), "output": str(output), "dtype": dtype}
    summary |= {"files": len(written), "bytes": sum(written)}
    return {**summary, "onnx": graph} if onnx else summary


class Plan:
    """What goes where: decided from names, dtypes and shapes alone.

    total_bytes: of all tensors; weight_map: {name: file}; index: what model.safetensors.index.json says, or None.
    """

    def __init__(self, folder, task, opened, dtype, max_shard_bytes):
        net = model.outline(model.saved_configuration(folder), task)
        weights.check(opened, net, lora.weights_file(folder))
        lacking = model.beside_weights(net)
        if lacking:
            raise DataError(f"{folder}: weights missing or not of this model: {', '.join(lacking[:5])}")
        names = [name for name, _ in net.named_parameters()]
        self._saved = {model.lasting_name(net, name): name for name in names}  # in the file they have the first name
        held = {name: _without_memory(opened.get_slice(saved), dtype) for name, saved in self._saved.items()}
        published = model.published(net, held)
        self._net, self._groups = net, _groups(net, held, published)
        self.dtype, self.total_bytes = dtype, sum(tensor.nbytes for tensor in published.values())
        parts = shards({name: tensor.nbytes for name, tensor in published.items()}, max_shard_bytes)
        self._outlines = {
            file: tensors.Outline({name: (published[name].dtype, published[name].shape) for name in part})
            for file, part in parts.items()
        }
        self.weight_map = {name: file for file, part in parts.items() for name in part}
        self.parameters = net.num_parameters()
        about = {"total_parameters": self.parameters, "total_size": self.total_bytes}
        self.index = {"metadata": about, "weight_map": self.weight_map} if len(parts) > 1 else None

    def write(self, hidden, opened):
        """Write all shards into the folder `hidden`. Raises DataError, OSError."""
        for file, outline in self._outlines.items():  # all at their full length, before the long work
            outline.create(hidden / file)
        progress, done, said = Progress("export", len(self._groups)), 0, time.monotonic()
        try:
            for number, group in enumerate(self._groups, 1):
                done += self._copy(hidden, opened, group)
                far = f"{done / 1e9:.2f} of {self.total_bytes / 1e9:.2f} GB"
                told = time.monotonic() - said > _LINE_EVERY_S
                said = time.monotonic() if told else said
                progress.update(number, f"export: {far}" if told else None, far)
        finally:
            progress.close()

    def _copy(self, hidden, opened, group):
        """Write what becomes of the tensors `group`, and forget them: no others are in memory. Returns bytes."""
        done = 0
        held = {name: opened.get_tensor(self._saved[name]) for name in group}
        for name, values in model.published(self._net, held).items():
            values = rounded(name, values, self.dtype)
            file = self.weight_map[name]
            handle = os.open(hidden / file, os.O_WRONLY)
            try:
                self._outlines[file].write(handle, name, (slice(None),) * values.dim(), values)
            finally:
                os.close(handle)
            done += values.nbytes
        return done


def shards(sizes, limit):
    """{file: [names]} as `save_pretrained` divides tensors. sizes: {name: bytes}, in the order of the model."""
    parts, open_part, room = [], [], limit
    for name, count in sizes.items():
        if count > limit:
            parts.append([name])
            continue
        if count > room:
            parts.append(open_part)
            open_part, room = [], limit
        open_part.append(name)
        room -= count
    parts += [open_part] if open_part else []
    if len(parts) == 1:
        return {lora.PLAIN: parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def rounded(name, values, dtype):
    """`values` in `dtype`, to nearest, where they are floating. Raises DataError for one that would become infinite."""
    if not values.is_floating_point():
        return values
    made = values.to(dtype)
    if dtype.itemsize < values.dtype.itemsize and made.isinf().any():
        lost = values[made.isinf() & values.isfinite()]
        if lost.numel():
            short = next(short for short, known in DTYPES.items() if known == dtype)
            raise DataError(
                f"{name}: {lost.abs().max():g} is beyond the range of {short} (largest: {torch.finfo(dtype).max:g}); "
                f"export as {'bf16 or fp32' if short == 'fp16' else 'fp32'}"
            )
    return made


def _without_memory(part, dtype):
    """A tensor without memory like the one of safe_open's slice, in `dtype` if it is floating."""
    saved = tensors.DTYPES[part.get_dtype()]
    return torch.empty(part.get_shape(), dtype=dtype if saved.is_floating_point else saved, device="meta")


def _groups(net, held, published):
    """The least that must be in memory together: lists of names of `held` that end up in the same tensors.

    held, published: {name: tensor on the meta device}, before and after `model.published`.
    """
    if published is held:
        return [[name] for name in held]
    groups = {}
    for name, tensor in held.items():
        # Alone, a part of a larger tensor gives one that has not the right shape, but its name.
        groups.setdefault(next(iter(model.published(net, {name: tensor}))), []).append(name)
    made = {}
    for group in groups.values():
        made.update(model.published(net, {name: held[name] for name in group}))
    if {name: tensor.shape for name, tensor in made.items()} != {name: t.shape for name, t in published.items()}:
        raise DataError(f"{net.config.model_type} models cannot be exported: their tensors do not convert one by one")
    return list(groups.values())


def _write_beside(folder, hidden, plan):
    """All files but the weights; plan: None beside an adapter, which has no configuration of a model."""
    for name in (GENERATION, *tokenizer.FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, hidden / name)
    if plan is None:
        return
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    settings["dtype"] = str(plan.dtype).removeprefix("torch.")
    (hidden / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if plan.index:
        (hidden / INDEX).write_text(json.dumps(plan.index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

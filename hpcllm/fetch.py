"""A model with its tokenizer from Hugging Face's hub, or a mirror of it, in one folder: on login nodes, before a job.

The one command that uses a network; nothing else of hpcllm imports this. Taken are configuration, tokenizer, licence
and weights in safetensors files, each checked by its SHA-256; never pickles, never code.
"""

import contextlib
import fnmatch
import json
import os
import shutil
from pathlib import Path

from . import export, files, lora, model
from .data import tokenizer
from .errors import CannotCreate, DataError, IOFailure, MissingInput
from .monitor import Progress

SOURCE = "fetched.json"
_TAKEN = (
    *(export.CONFIG, export.GENERATION, export.INDEX, "model.safetensors", "model-*-of-*.safetensors"),
    *(*tokenizer.FILES, "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)


def fetch(name, output, revision=None, overwrite=False):
    """Write the folder `output` with the model `name` ("owner/model") of the hub; returns what it is. One process.

    revision: a branch, tag or commit, None: the hub's own choice; the commit is kept in fetched.json. Raises a Refusal,
    and leaves nothing behind: MissingInput (66) for what the hub does not have or does not give to this user, DataError
    (65) for models without safetensors weights, of code of their own, or damaged on the way, CannotCreate (73) for an
    output that is in the way or has no room, IOFailure (74) where the network or the disk fails.
    """
    output = Path(output).absolute()
    _check_output(output, overwrite)
    commit, wanted = _listing(name, revision)
    total = sum(size for size, _ in wanted.values())
    free = shutil.disk_usage(output.parent).free
    if total > free:
        raise CannotCreate(f"{output}: {name} has {total / 1e9:.2f} GB, and there are {free / 1e9:.2f} GB left")
    progress = Progress("fetch", len(wanted))
    progress.say(f"{name} at {commit[:12]}: {len(wanted)} files, {total / 1e9:.2f} GB")
    with files.failing_as_io(output), files.new_folder(output, replace=overwrite) as hidden:
        for number, (file, (size, sha256)) in enumerate(wanted.items(), 1):
            path = _download(name, commit, file, hidden)
            if path.stat().st_size != size or (sha256 and files.digest(path) != sha256):
                raise DataError(f"{name}: {file} is not what the hub says that it is (size or SHA-256); fetch it again")
            progress.update(number, f"{number}/{len(wanted)} {file} {size / 1e6:.1f} MB", file)
        progress.close()
        shutil.rmtree(hidden / ".cache", ignore_errors=True)  # what the hub's library notes of a download
        _check(name, hidden)
        said = {"name": name, "revision": commit, "files": {file: digest for file, (_, digest) in wanted.items()}}
        files.write_json(hidden / SOURCE, said)
        _check_output(output, overwrite)  # it may be another folder by now
    return {"output": str(output), "name": name, "revision": commit, "files": len(wanted), "bytes": total}


def _check_output(output, overwrite):
    """Refuse an output that is in the way, unless it is to be replaced and holds what was fetched and no more."""
    if not (overwrite and (output / SOURCE).is_file()):
        return export.check(output, False)
    try:
        known = set(json.loads((output / SOURCE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CannotCreate(
            f"{output}: {SOURCE} does not tell what was fetched, so --overwrite leaves it alone: {error}"
        ) from None
    strangers = sorted(set(os.listdir(output)) - {name.partition("/")[0] for name in known} - {SOURCE})
    if strangers or output.is_symlink():
        listed = ", ".join(strangers[:5]) or "what a link leads to"
        raise CannotCreate(f"{output} also holds {listed}; --overwrite would delete what was not fetched")


def _listing(name, revision):
    """(commit, {file: (bytes, SHA-256, None for small files)}) of what is taken of a model of the hub."""
    from huggingface_hub import HfApi

    with _asking(name, revision):
        found = HfApi().model_info(name, revision=revision, files_metadata=True)
    every = {one.rfilename: one for one in found.siblings or ()}
    taken = sorted(file for file in every if any(fnmatch.fnmatchcase(file, pattern) for pattern in _TAKEN))
    if export.CONFIG not in taken:
        raise DataError(f"{name}: has no {export.CONFIG} and so is no model of transformers")
    if not any(file.endswith(".safetensors") for file in taken):
        others = [file for file in every if file.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"))]
        has = f"weights in {others[0]} only" if others else "no weights"
        raise DataError(f"{name}: has {has}; hpcllm reads safetensors, which carry no program")
    hashes = {file: every[file].lfs.sha256 if every[file].lfs else None for file in taken}
    return found.sha, {file: (every[file].size or 0, hashes[file]) for file in taken}


def _download(name, commit, file, folder):
    from huggingface_hub import hf_hub_download

    with _asking(name, commit):
        return Path(hf_hub_download(name, file, revision=commit, local_dir=folder))


@contextlib.contextmanager
def _asking(name, revision):
    """What the hub's library raises inside becomes a sentence of ours; what the disk raises stays as it is."""
    from huggingface_hub import constants, errors

    what, hub = f"{name}{'' if revision is None else f' at {revision}'}", constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        why = "its owner gives it to some only; ask there, and set HF_TOKEN to your token"
        raise MissingInput(f"{what}: {why}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise MissingInput(f"{what}: {hub} has no such model, or not for you (HF_TOKEN)") from None
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError):
        raise MissingInput(f"{what}: {hub} has the model, but not that of it") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise IOFailure(f"{what}: {hub} does not answer as it should: {said}") from None


def _check(name, folder):
    """Raise DataError unless the folder can be used without a network: model, tokenizer, every file of weights."""
    from huggingface_hub import constants
    from safetensors import SafetensorError, safe_open

    constants.HF_HUB_OFFLINE = True  # transformers asks the hub even about folders, and waits

    config = model.saved_configuration(folder)
    if getattr(config, "auto_map", None):
        raise DataError(f"{name}: needs a program of its own (auto_map in config.json), which hpcllm does not run")
    tokenizer.load(str(folder))
    if (folder / export.INDEX).is_file() and not (folder / lora.PLAIN).is_file():
        try:
            named = set(json.loads((folder / export.INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DataError(f"{name}: {export.INDEX} names no weights: {error}") from None
        if lacking := sorted(one for one in named if not (folder / str(one)).is_file()):
            raise DataError(f"{name}: the hub lacks {lacking[0]}, which {export.INDEX} names")
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise DataError(f"{name}: {file.name} is damaged: {error}") from None

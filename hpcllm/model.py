"""A transformers model in: from a configuration or a folder; and what the data path must know of a tokenizer.

The only importer of transformers beside `tasks` and `data.tokenizer`. Nothing is fetched from a hub, no code from a
model folder is run, and only safetensors weights are read.
"""

import contextlib
import difflib
import fnmatch
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from . import lora, weights
from .data.labels import WITHOUT_NAMES
from .errors import DataError, MissingInput, UsageError
from .tasks import TASKS

LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Vocabulary:
    """Token ids with a meaning; None where the tokenizer has none. special, ordinary: int64 arrays of ids.

    size: one more than the highest id; segments: models get token_type_ids, which tell a second text from a first;
    sentinels: ids of <extra_id_0>, <extra_id_1>, ..., which stand for what is hidden.
    """

    size: int
    cls: int | None
    sep: int | None
    mask: int | None
    pad: int | None
    bos: int | None
    eos: int | None
    special: np.ndarray
    ordinary: np.ndarray
    segments: bool = False
    sentinels: tuple = ()

    @property
    def padding(self):
        """The id that rows are filled up with; the model does not attend to it, so any will do."""
        return next((number for number in (self.pad, self.eos) if number is not None), 0)


def vocabulary(tokenizer):
    """Vocabulary of a transformers tokenizer."""
    known = tokenizer.get_vocab()
    numbers = np.array(sorted(known.values()), dtype=np.int64)  # there may be gaps
    special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
    names = ("cls", "sep", "mask", "pad", "bos", "eos")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    sentinels = map(known.get, map("<extra_id_{}>".format, itertools.count()))
    more = {"special": special, "ordinary": np.setdiff1d(numbers, special)}
    more |= {"segments": "token_type_ids" in tokenizer.model_input_names}
    more |= {"sentinels": tuple(itertools.takewhile(lambda number: number is not None, sentinels))}
    return Vocabulary(int(numbers[-1]) + 1, **ids, **more)


def build(section, words, sequence_length, seed, meaning=None, adapters=None):
    """(the model that the run file's [model] section describes, where its weights come from), fp32.

    section: config.Model; words: Vocabulary; meaning: of labelled data, what their labels are; adapters: config.Lora,
    None for none. The model has no weights (on the meta device) where they are to come from a `weights.Fresh`, and has
    them, on the CPU, where that is None.
    Raises UsageError for a configuration that transformers does not know or that does not fit vocabulary or sequence
    length, or names to freeze or adapt that the model does not have; MissingInput and DataError for an unusable folder.
    """
    torch.manual_seed(seed)
    head = TASKS[section.task].head(meaning) if meaning else {}
    if section.init_from:
        model, missing = _load(section.init_from, TASKS[section.task].model_class(), strict=False, head=head)
        source = None
        if adapters:
            torch.manual_seed(weights.seed_of(seed, "lora"))
            lora.adapt(model, adapters.model_dump(), missing)
    else:
        made = configuration(section, words)
        made.update(head)
        model = outline(made, section.task)
        source = weights.Fresh(model, seed)
    if head and not _counts_from_padding(model):  # decoders find a text's last token by what rows are filled up with
        model.config.pad_token_id = words.padding
    freeze_named(model, section.freeze)
    check_fits(model, words, sequence_length)
    return model, source


def _counts_from_padding(model):
    """True of families as RoBERTa, whose positions begin behind the configuration's pad_token_id: it is as it is."""
    return any(hasattr(m, "position_embeddings") and hasattr(m, "padding_idx") for m in model.modules())


def outline(made, task):
    """The model of a transformers configuration for `task`, without weights. Raises UsageError."""
    with _refused_by_transformers(), weights.absent():
        return TASKS[task].model_class().from_config(made, dtype=torch.float32)


def resume(folder, task, freeze=()):
    """(the model of a checkpoint, without weights, where they come from); see `build`. freeze: as in the run file."""
    folder = require_folder(folder)
    model, source, adapted = outline(saved_configuration(folder), task), saved(folder), lora.read(folder)
    if adapted:
        lora.adapt(model, adapted, adapted["whole"])
    source.check(model)
    freeze_named(model, freeze)
    return model, source


@contextlib.contextmanager
def _refused_by_transformers():
    """What transformers raises inside becomes a UsageError: each family has checks, and exceptions, of its own."""
    try:
        yield
    except Exception as error:
        raise UsageError(f"model.config: transformers cannot build this model: {error}") from None


def configuration(section, words=None):
    """transformers' configuration of the model that the run file's [model] section describes. Raises as `build`.

    words: Vocabulary that it is for; without, the vocabulary is the family's own where the run file names none.
    """
    from transformers import CONFIG_MAPPING

    if section.init_from:
        return saved_configuration(require_folder(section.init_from))
    given = dict(section.config)
    kind = given.pop("model_type")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3)
        raise UsageError(f'model.config: transformers knows no model_type "{kind}" (near: {", ".join(near) or "none"})')
    family = CONFIG_MAPPING[kind]
    plain = family()
    known = set(plain.to_dict()) | set(family.attribute_map)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f' (did you mean "{near[0]}"?)' if near else ""
            raise UsageError(f'model.config: {kind} has no argument "{name}"{hint}')
    if words is not None:
        given.setdefault("vocab_size", words.size)
        for name in ("pad", "bos", "eos"):
            if f"{name}_token_id" in known:
                given.setdefault(f"{name}_token_id", getattr(words, name))
        if plain.is_encoder_decoder:  # what a decoder's first token is, as T5 has it
            given.setdefault("decoder_start_token_id", words.padding)
    with _refused_by_transformers():
        return family(**given)


def saved_configuration(folder):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: config.json cannot be used: {error}") from None


def label_names(folder, task):
    """(kind, names in order) of the labels of the model in `folder`, as data say it; None for a task without labels."""
    config = saved_configuration(require_folder(folder))
    kinds = getattr(TASKS[task], "KINDS", None)
    if kinds is None or not hasattr(TASKS[task], "scores"):
        return None
    kind = next(k for k, said in kinds.items() if said == config.problem_type) if isinstance(kinds, dict) else kinds[0]
    return kind, [] if kind in WITHOUT_NAMES else [config.id2label[number] for number in range(config.num_labels)]


def saved(folder):
    """Where the weights of the checkpoint `folder` come from (weights.Saved)."""
    return weights.Saved(lora.weights_file(folder))


def require_folder(folder):
    """The Path of a model folder. Raises MissingInput for any other, and DataError for an adapter of one
    and for one that needs a program of its own."""
    read_config(folder)
    return Path(folder)


def read_config(folder):
    """What config.json of a model folder says, a dict. Raises as `require_folder`."""
    folder = Path(folder)
    if (folder / lora.ADAPTER_CONFIG).is_file():  # which transformers would follow to its model, wherever that is
        raise DataError(f"{folder} holds an adapter of a model; `hpcllm export` without --adapter writes the whole")
    if not (folder / "config.json").is_file():
        raise MissingInput(f"{folder} is not a model folder in Hugging Face's layout: it has no config.json")
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder}: config.json cannot be used: {error}") from None
    if not isinstance(said, dict):
        raise DataError(f"{folder}: config.json cannot be used: it holds no settings")
    if said.get("auto_map"):
        raise DataError(f"{folder} needs a program of its own (auto_map in config.json), which hpcllm does not run")
    return said


def require_safetensors(folder):
    """Raise DataError for a folder whose weights are pickles, which may hold any program."""
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if others and not any(folder.glob("*model*.safetensors")):
        raise DataError(f"{folder} has weights in {others[0]} only; hpcllm reads safetensors, which carry no program")


def freeze_named(model, patterns):
    """Parameters whose names match one of the shell `patterns` are not trained. Raises UsageError for one of none."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise UsageError(f'model: freeze: no parameter is called "{pattern}" (near: {", ".join(near) or "none"})')
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"model: freeze: {', '.join(patterns)} leaves no parameter to train")


def load(folder, task, *, strict=True, head=None):
    """A model in Hugging Face's layout for `task`, fp32 on the CPU.

    strict: every weight must be there and used (a checkpoint); otherwise a missing head starts at random. head: what
    its configuration is to say of labels, instead of what the folder's does.
    """
    return load_as(folder, TASKS[task].model_class(), strict=strict, head=head)


def load_as(folder, model_class, *, strict=True, head=None, unused=(), divide=None):
    """As `load`, of a class of transformers (AutoModel, ...).

    unused: beginnings of names that may be missing; divide: called with the model whose weights still lie in the file,
    to leave a part of them, which is all that memory is taken for.
    """
    return _load(folder, model_class, strict=strict, head=head, unused=unused, divide=divide)[0]


def _load(folder, model_class, *, strict, head=None, unused=(), divide=None):
    """(the model of `load_as`, names of weights that the folder lacks and that started at random)"""
    folder, given, place = require_folder(folder), head or {}, folder
    require_safetensors(folder)
    how = {"output_loading_info": True, "use_safetensors": True, "dtype": torch.float32}
    try:
        if lora.read(folder):
            given, place = _merged(folder, given), None
            with weights.absent():  # transformers' own class: their Auto classes load nothing that has no place
                model_class = type(model_class.from_config(given["config"]))
        model, report = model_class.from_pretrained(place, **how, **LOCAL, **given)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise DataError(f"{folder}: the model cannot be loaded for {model_class.__name__}: {error}") from None
    output, words = model.get_output_embeddings(), model.get_input_embeddings()
    if output is not None and output.weight is not words.weight:
        model.config.tie_word_embeddings = False  # a folder may hold both and say otherwise
    missing = [name for name in report["missing_keys"] if not name.startswith(tuple(unused))]
    wrong = sorted(report["mismatched_keys"]) + sorted(missing if strict else [])
    if wrong:
        raise DataError(f"{folder}: weights missing or of another shape: {', '.join(map(str, wrong[:5]))}")
    if divide is not None:
        divide(model)
    for parameter in model.parameters():
        # From slices of a mapped file into memory that torch allocates: BLAS sums in another order where the
        # alignment is another, and a continued run would no longer repeat an uninterrupted one to the bit.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model, missing


def _merged(folder, head):
    """What `from_pretrained` is given of a checkpoint with LoRA, whose weights it does not find by itself."""
    from transformers import GenerationConfig

    made, generation = saved_configuration(folder), {}
    made.update(head)
    if (folder / "generation_config.json").is_file():
        generation["generation_config"] = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return {"config": made, "state_dict": lora.merged(folder), **generation}


def lasting_name(model, name):
    """Of a parameter that has several names, as tied ones have, the one under which `save_pretrained` keeps it."""
    return model.all_tied_weights_keys.get(name, name)


def published(model, tensors):
    """{name: tensor} under the names and in the shapes that `save_pretrained` gives them, in its order.

    tensors: {name: tensor} by the parameters of `model`. Where the family is published as it is here, `tensors` itself.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def class_name(model):
    """The name of transformers' class, whatever has been made of an instance of it."""
    return type(model).__name__.removeprefix("FSDP")


def check_fits(model, words, sequence_length):
    """Raise UsageError where tokens would have no embedding or no position."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < words.size:
        raise UsageError(f"model: {rows} embeddings (vocab_size) are too few for the tokenizer's {words.size} ids")
    kept = beside_weights(model)
    if kept:
        raise UsageError(f"model: {model.config.model_type} keeps {kept[0]}, which is no weight: checkpoints lack it")
    check_length(model.config, sequence_length)


def beside_weights(model):
    """Names of what belongs to a model's state and is no parameter: checkpoints have parameters only.

    Zeros that transformers puts there by itself where a folder lacks them (as BART's bias of logits is) are none.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    others = {name: value for name, value in model.state_dict().items() if name not in known}
    zeros = {name for name in others if any(re.search(pattern, name) for pattern in ignored)}
    return sorted(name for name, value in others.items() if name not in zeros or value.any())


def check_length(config, sequence_length):
    """Raise UsageError where a model of transformers' configuration has no positions for so many tokens."""
    places = getattr(config, "max_position_embeddings", None)
    if places is not None and sequence_length > places:
        raise UsageError(
            f"train: sequence_length ({sequence_length}) is more than the model's max_position_embeddings ({places})"
        )

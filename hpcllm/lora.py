"""LoRA (Hu et al. 2021, arXiv 2106.09685): a model stays as it is, and narrow layers beside some of its own learn.

The layers are PEFT's, put into transformers' models; parallelism sees parameters, most of them frozen. A checkpoint
holds all weights under PEFT's names, in a file that nobody but hpcllm takes for a model's (WEIGHTS), and beside it what
it takes to make the layers again (SETTINGS). Who reads it by `opened` sees the plain model, what was learnt added.
"""

import contextlib
import difflib
import importlib.util
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

from safetensors import safe_open
from safetensors.torch import save_file

from .errors import DataError, UsageError

PLAIN, WEIGHTS, SETTINGS = "model.safetensors", "lora.safetensors", "lora.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_ARGUMENTS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")
# Of other tasks PEFT would save modules that it knows by usual names, beside those that are named.
_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "dialogue": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM"}


def adapt(model, settings, whole=()):
    """Put LoRA into `model`, in place, and freeze all else of it but the parameters called `whole`.

    settings: arguments of PEFT's LoraConfig, {key of config.Lora: value}; whole: what started at random, and is trained
    as it is. New weights are where those beside them are; on a CPU they are drawn from torch's generator. What a
    checkpoint must know is in `model.lora` then. Raises UsageError without PEFT, and for layers that it cannot adapt.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError("[lora] needs peft: pip install 'hpcllm[lora]'")
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer, LoraModel

    _check_targets(model, settings["target_modules"], LoraModel.target_module_mapping)
    beside = sorted({name.rpartition(".")[0] for name in whole})
    made = LoraConfig(**{key: settings[key] for key in _ARGUMENTS}, exclude_modules=beside or None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says what it finds out: that GPT-2's weights are [in, out]
            inject_adapter_in_model(made, model)
    except ValueError as error:
        raise UsageError(f"lora: PEFT cannot adapt this model: {error}") from None
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in layers.items():
        if type(module) is not Linear or module is model.get_output_embeddings():
            raise UsageError(f"lora: target_modules: {name} is no linear layer between embeddings and output layer")
    trained = {name: parameter for name, parameter in model.named_parameters() if name in whole}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    transposed = [name for name, module in layers.items() if module.fan_in_fan_out]
    model.lora = {**settings, "target_modules": list(layers), "transposed": transposed, "whole": list(trained)}
    model.lora["modules_to_save"] = _modules(model, beside, trained)


def _modules(model, names, trained):
    """The outermost of the modules called `names`; None where PEFT, which saves whole modules, would save more of them
    than is `trained`: layers that share a weight with the embeddings."""
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    held = {f"{name}.{key}" for name in outer for key, _ in model.get_submodule(name).named_parameters()}
    return outer if held <= trained.keys() else None


def _check_targets(model, wanted, known):
    """Raise UsageError for names that no layer has, or none where PEFT knows no usual ones. known: it does of these."""
    kind, layers = model.config.model_type, [name for name, _ in model.named_modules()]
    if wanted is None and kind not in known:
        raise UsageError(f'lora: PEFT knows no usual target_modules of {kind}: name some, or give "all-linear"')
    for target in wanted if isinstance(wanted, list) else ():
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            short = sorted({name.rpartition(".")[2] for name in layers})
            near = difflib.get_close_matches(target, short, n=3, cutoff=0.3)
            raise UsageError(f'lora: target_modules: no layer is called "{target}" (near: {", ".join(near) or "none"})')


# --- checkpoints -------------------------------------------------------------------------------------------------


def read(folder):
    """`model.lora` of the model that the checkpoint `folder` is of; None where that has no LoRA. Raises DataError."""
    file = Path(folder) / SETTINGS
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def weights_file(folder):
    """The Path of the weights of a checkpoint."""
    return Path(folder) / (WEIGHTS if (Path(folder) / SETTINGS).is_file() else PLAIN)


@contextlib.contextmanager
def opened(folder):
    """The weights of the checkpoint `folder` as safetensors.safe_open gives them: those of the plain model."""
    settings = read(folder)
    with safe_open(weights_file(folder), framework="pt") as file:
        yield file if settings is None else _Merged(file, settings)


class _Merged:
    """An open WEIGHTS file under the plain model's names, what LoRA has learnt added to the weights."""

    def __init__(self, file, settings):
        self._file, self._settings = file, settings
        held = [name for name in file.keys() if ".lora_" not in name]  # noqa: SIM118
        self._held = {name.replace(".base_layer.", "."): name for name in held}
        self._adapted = {f"{name}.weight": name for name in settings["target_modules"]}

    def keys(self):
        return list(self._held)

    def get_slice(self, name):
        """Shape and dtype of a tensor; parts of it cannot be had."""
        held = self._file.get_slice(self._held[name])
        return SimpleNamespace(get_shape=held.get_shape, get_dtype=held.get_dtype)

    def get_tensor(self, name):
        held, layer, how = self._file.get_tensor(self._held[name]), self._adapted.get(name), self._settings
        if layer is None:
            return held
        down, up = (self._file.get_tensor(f"{layer}.lora_{side}.default.weight") for side in "AB")  # [r, in], [out, r]
        scaling = how["lora_alpha"] / (math.sqrt(how["r"]) if how["use_rslora"] else how["r"])
        learnt = up @ down
        return held + (learnt.T if layer in how["transposed"] else learnt) * scaling


def merged(folder):
    """{name: tensor} of the plain model of the checkpoint `folder`."""
    with opened(folder) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _learnt(file, settings):
    """Names of what is trained in an open WEIGHTS file."""
    return [name for name in file.keys() if ".lora_" in name or name in settings["whole"]]  # noqa: SIM118


def describe(folder):
    """What a model card says of the LoRA of the checkpoint `folder`; None without."""
    settings = read(folder)
    if settings is None:
        return None
    with safe_open(weights_file(folder), framework="pt") as file:
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in _learnt(file, settings))
    kind = "rank-stabilised, " if settings["use_rslora"] else ""
    return (
        f"r {settings['r']}, alpha {settings['lora_alpha']}, {kind}dropout {settings['lora_dropout']:g}, in "
        f"{len(settings['target_modules'])} layers; {count} parameters trained"
    )


def write_adapter(folder, output, task, base, rounded):
    """What the checkpoint `folder` has learnt, in the two files that PEFT's `PeftModel.from_pretrained` loads.

    base: where that is to find the model; rounded(name, tensor): the tensor as it is to be written. Raises UsageError
    for what those files cannot hold.
    """
    settings = read(folder)
    if settings["modules_to_save"] is None:
        raise UsageError(
            f"--adapter: {settings['whole'][0]} started at random beside weights that layers share, and PEFT takes "
            "whole layers alone; export without --adapter"
        )
    with safe_open(weights_file(folder), framework="pt") as file:
        learnt = {name: rounded(name, file.get_tensor(name)) for name in _learnt(file, settings)}
    named = {f"base_model.model.{name.replace('.default.', '.')}": value for name, value in learnt.items()}
    save_file(named, Path(output) / ADAPTER, metadata={"format": "pt"})
    said = {key: settings[key] for key in (*_ARGUMENTS, "modules_to_save")}
    said |= {"peft_type": "LORA", "task_type": _TASK_TYPES.get(task), "base_model_name_or_path": base}
    said |= {"fan_in_fan_out": bool(settings["transposed"]), "inference_mode": True}
    (Path(output) / ADAPTER_CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""Where weights come from. A model is made without any, and each rank gets its pieces, whatever the layout.

`Fresh` draws initial weights one unit at a time, from the seed and the unit's name, so they are the same in all layouts
and no rank ever holds more than its pieces and one unit. `Saved` reads pieces from a checkpoint.
"""

import contextlib
import copy
import hashlib

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from . import tensors
from .errors import DataError, IOFailure
from .parallel.sharding import blocks, local


@contextlib.contextmanager
def absent():
    """Modules made in this context have parameters without memory (on the meta device), and buffers as ever."""
    register = nn.Module.register_parameter

    def register_without_memory(module, name, parameter):
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_without_memory
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def give(modules, device):
    """Memory on `device`, of whatever contents, to the parameters of `modules` that have none. Shared ones stay so."""
    given = {}
    for module in modules:
        for inner in module.modules():
            for key, parameter in inner._parameters.items():
                if parameter is not None and parameter.is_meta:
                    if id(parameter) not in given:
                        empty = torch.empty_like(parameter, device=device, requires_grad=False)
                        given[id(parameter)] = parameter, nn.Parameter(empty, parameter.requires_grad)
                    inner._parameters[key] = given[id(parameter)][1]
        if isinstance(module, FSDPModule):
            module._apply(lambda tensor: tensor)  # it takes notice


def fill(placed, source, device):
    """Give the parameters of `placed` (parallel.apply.Placed) memory on `device` and their values from `source`."""
    give([part.model for part in placed.parts], device)
    refill(placed, source)


def refill(placed, source):
    """Give the parameters of `placed` their values from `source`."""
    source.fill(
        {
            name: (placed.places(placed.pieces[name], parameter), local(parameter.detach()))
            for name, parameter in placed.named_parameters()
        }
    )


class Fresh:
    """Initial weights of `model`, as its class would draw them: {name: tensor} of one unit after the other.

    A unit is a block; the last is all that is outside of blocks.
    """

    def __init__(self, model, seed):
        self._model, self._seed = copy.deepcopy(model), seed

    def fill(self, wanted):
        """wanted: {parameter name: ([(box of the whole tensor, box of the piece)], the piece)}."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        for prefix, owner, unit in self._units():
            mine = [names[id(parameter)] for parameter in unit.parameters()]
            if wanted.keys().isdisjoint(mine):
                continue
            made = copy.deepcopy(unit)
            give([made], "cpu")
            torch.manual_seed(seed_of(self._seed, prefix))
            _initialise(made, owner)
            for name, parameter in zip(mine, made.parameters(), strict=True):
                boxes, piece = wanted.get(name, ((), None))
                for outer, inner in boxes:
                    piece[inner] = parameter.detach()[outer]

    def _units(self):
        """(name, the model that it is part of, module)."""
        known = {id(block) for block in blocks(self._model)}
        owners = {"": self._model}
        for name, module in self._model.named_modules():
            if isinstance(module, PreTrainedModel):
                owners[name] = module
            if id(module) in known:
                owner = max((o for o in owners if name.startswith(o)), key=len)
                yield name, owners[owner], module
        yield "", self._model, copy.deepcopy(self._model, _outside(self._model, known))


def _outside(model, known):
    """A memory for copy.deepcopy that keeps a model's parameters and leaves its blocks empty."""
    kept = {id(parameter): parameter for parameter in model.parameters()}
    return kept | {id(module): nn.Module() for module in model.modules() if id(module) in known}


@torch.no_grad()
def _initialise(module, owner):
    """As transformers does it: children first, each by the rules of the innermost model that it is part of."""
    for child in module.children():
        _initialise(child, child if isinstance(child, PreTrainedModel) else owner)
    owner._init_weights(module)


def seed_of(seed, name):
    """A seed for what has a name: far from those of other names and seeds."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") >> 1


def check(opened, model, file):
    """Raise DataError for weights of `model` that an open `file` lacks, has in another shape, or has too many of."""
    shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = sorted(name for name in wanted | shapes if shapes.get(name) != wanted.get(name))
    if wrong:
        raise DataError(f"{file}: weights missing, of another shape or too many: {', '.join(wrong[:5])}")


class Saved:
    """The weights in a safetensors file."""

    def __init__(self, file):
        self._file = file

    def check(self, model):
        """Raise DataError, before anything starts, for weights of `model` that are missing or of another shape."""
        with self._opened() as opened:
            check(opened, model, self._file)

    def fill(self, wanted):
        """As `Fresh.fill`."""
        with self._opened() as opened:
            for name, (boxes, piece) in wanted.items():
                tensors.read(opened, name, boxes, piece)

    @contextlib.contextmanager
    def _opened(self):
        try:
            with safe_open(self._file, framework="pt") as opened:
                yield opened
        except (FileNotFoundError, SafetensorError) as error:
            raise DataError(f"{self._file} cannot be read: {error}") from None
        except OSError as error:
            raise IOFailure(f"{self._file} cannot be read: {error}") from None

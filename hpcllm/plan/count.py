"""What a model holds and does, counted by running it once without memory: no family has a formula of its own.

One forward pass of two sequences on fake tensors (torch's FakeTensorMode: shapes and dtypes, no numbers) on this host,
whatever the size. Watched: floating-point operations, bytes that autograd keeps for backward, and which of them the
tensor axis divides (arXiv 1909.08053; `hpcllm.parallel.tensor` cuts by the same plan).
"""

import contextlib
import dataclasses
import fnmatch
import warnings

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..errors import UsageError
from ..parallel import sharding, tensor
from .shapes import Part, Shapes

_ROWS = 2  # sequences: of one alone, transposing some dims takes no copy


def count(make, tokens, targets=None, precision="fp32", gpu=True):
    """The Shapes of the transformers model that `make()` builds.

    tokens: of a sequence; targets: of them, those whose logits are computed (default: all); precision: as in the run
    file; gpu: as a GPU would compute it, with fused attention and dropout.
    """
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().train()
        watch = _Watch(model, targets or tokens)
        ids = torch.zeros(_ROWS, tokens, dtype=torch.int64)
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        more |= {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
        half = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        real = _AsWithNumbers(gpu, not model.config.is_encoder_decoder, watch.attend)
        with watch, torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda kept: kept), half, real:
            made = model(input_ids=ids, **more)
    logits = sum(made[name].numel() for name in ("logits", "start_logits", "end_logits") if name in made)
    return watch.shapes(tokens, logits / _ROWS)


class _AsWithNumbers(TorchFunctionMode):
    """Makes operations keep what they would keep if there were numbers, and as a GPU does where that is meant."""

    def __init__(self, gpu, alone, attend):
        """gpu: attention without its matrix, dropout with a byte a number; alone: there is but one stack of layers;
        attend(query, key, value, masked): is told of each attention."""
        super().__init__()
        self._gpu, self._alone, self._attend = gpu, alone, attend

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = dict(named or {})
        if function is nn.functional.scaled_dot_product_attention:
            mask = named.get("attn_mask")
            self._attend(*arguments[:3], mask is not None or named.get("is_causal", False))
            if self._alone and mask is not None and not mask.requires_grad:
                # transformers leaves out a mask that only says "causal", but not where it cannot look into it.
                named |= {"attn_mask": None, "is_causal": True}
            if self._gpu:
                named["dropout_p"] = 0.0
        if function is nn.functional.dropout and self._gpu:
            rate, training = self._dropout(*arguments, **named)
            return torch.native_dropout(arguments[0], rate, True)[0] if training and rate else arguments[0]
        return function(*arguments, **named)

    @staticmethod
    def _dropout(_, p=0.5, training=True, inplace=False):
        return p, training


class _Watch(TorchDispatchMode):
    """Sees every operation, every tensor that autograd keeps and every module that runs, and adds up by block."""

    def __init__(self, model, targets):
        super().__init__()
        self._names = [field.name for field in dataclasses.fields(Part)]
        self._first, self._last, self._blocks = self._nothing(), self._nothing(), []
        self._now, self._inside = self._first, False
        self._parameters = {_storage(parameter): parameter for parameter in model.parameters()}
        self._users = {id(parameter): [] for parameter in model.parameters()}  # parts that use it
        self._cut = set()  # ids of the parameters that the tensor axis divides
        self._copies, self._whole, self._seen = {}, set(), set()
        self._entered, self._gathered = set(), False  # what entered the last region; whether it has been counted
        self._alive = []  # so that no storage gets the address of one that is gone
        self._follow_blocks(model)
        self._follow_regions(model)
        self._follow_words(model, targets)
        heads = getattr(model.config, "num_attention_heads", 1)
        self._copied = heads // (getattr(model.config, "num_key_value_heads", None) or heads)  # keys that queries share
        for module in model.modules():
            module.register_forward_pre_hook(self._use)

    def _nothing(self):
        return dict.fromkeys(self._names, 0)

    def _follow_blocks(self, model):
        blocks = sharding.blocks(model)
        if not blocks:
            raise UsageError(f"plan: {model.config.model_type} has no repeated blocks that hpcllm could count")

        def begin(block, given, named):
            self._now = self._nothing()
            self._blocks.append(self._now)
            entering = next(leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, torch.Tensor))
            self._now["entering"] = _bytes(entering)

        def end(block, given, left):
            self._now = self._last if len(self._blocks) == len(blocks) else self._first

        for block in blocks:
            block.register_forward_pre_hook(begin, with_kwargs=True)
            block.register_forward_hook(end)

    def _follow_regions(self, model):
        """What lies between a region's entry and the layer that gives a sum is divided by the tensor axis."""
        try:
            patterns = tensor.plan(model.config)
        except UsageError:
            return  # no such plan: `apply.check` refuses the axis
        found = [(name, module, how) for name, module in model.named_modules() for pattern, how in patterns.items()
                 if fnmatch.fnmatch(name, pattern)]  # fmt: skip
        for _, module, how in found:
            divided = [module.weight] if how in ("row", "heads") else module.parameters(recurse=False)
            self._cut.update(id(parameter) for parameter in divided)
            if how in ("row", "experts"):
                module.register_forward_hook(self._leave)
            if how == "experts":
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
        for name in dict.fromkeys(name.rpartition(".")[0] for name, _, how in found if how in ("column", "packed")):
            model.get_submodule(name).register_forward_pre_hook(self._enter, with_kwargs=True)

    def _follow_words(self, model, targets):
        """Embedding and output layer, of which only `targets` rows are computed (see tasks.masked_lm)."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self._cut.add(id(embedding.weight))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.weight is embedding.weight:
                module.register_forward_hook(self._leave)
        if head is not None:
            self._cut.update(id(parameter) for parameter in head.parameters())
            head.register_forward_pre_hook(lambda _, given: (given[0][:, :targets], *given[1:]))
            head.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _use(self, module, given):
        for parameter in module.parameters(recurse=False):
            users = self._users[id(parameter)]
            if not any(self._now is user for user in users):
                users.append(self._now)
                self._now["parameters"] += parameter.numel()
                self._now["cut"] += parameter.numel() * (id(parameter) in self._cut)
                self._now["frozen"] += parameter.numel() * (len(users) == 1 and not parameter.requires_grad)

    def _enter(self, module, given, named):
        tensors = [leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, torch.Tensor)]
        self._whole.update(map(_storage, tensors))
        self._alive += tensors
        self._entered, self._gathered = {_storage(tensors[0])}, False
        self._now["sums_back"] += _bytes(tensors[0])
        self._now["meetings"] += 1
        self._inside = True

    def attend(self, query, key, value, masked):
        numbers, both = key.numel() + value.numel(), max(key.element_size(), value.element_size())
        kind = key.device.type  # products take their arguments in another precision where that is on
        size = torch.get_autocast_dtype(kind).itemsize if torch.is_autocast_enabled(kind) else both
        self._now["attended"] += numbers * size
        self._now["keys"] += numbers * both / (self._copied if key.shape[1] == query.shape[1] else 1)
        self._now["masks"] += masked * _ROWS * query.shape[-2] * key.shape[-2] * size
        self._now["attentions"] += 1

    def _leave(self, module, given, left):
        self._now["sums"] += _bytes(left)
        self._now["meetings"] += 1
        self._inside = False

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        packet = function.overloadpacket
        if packet in flop_registry:
            self._now["flops"] += flop_registry[packet](*arguments, **(named or {}), out_val=made)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            query, key = arguments[0].shape, arguments[1].shape
            self._now["flops"] += 4 * query.numel() * key[-2]
        elif packet is torch.ops.aten._to_copy:
            self._follow_cast(arguments[0], made)
        if function.namespace == "aten" and not function.is_view:
            self._now["calls"] += 1
            for leaf in tree_leaves((arguments, named, made)):
                if isinstance(leaf, torch.Tensor):
                    self._move(leaf)
        return made

    def _move(self, moved):
        storage = _storage(moved)
        if storage not in self._parameters and storage not in self._copies:
            self._now["traffic_cut" if self._inside and storage not in self._whole else "traffic"] += _bytes(moved)
            self._now["traffic_entered"] += _bytes(moved) * (self._inside and storage in self._entered)

    def _follow_cast(self, given, made):
        """A cast of a weight is a copy of it; one of what entered a region is as whole as that."""
        storage, new = _storage(given), _storage(made)
        self._alive.append(made)
        if storage in self._parameters:
            self._copies[new] = id(self._parameters[storage]) in self._cut
        elif storage in self._whole:
            self._whole.add(new)
            if storage in self._entered:
                self._entered.add(new)

    def keep(self, kept):
        """For saved_tensors_hooks: every storage counts once, as large as it is."""
        storage = _storage(kept)
        if storage not in self._seen and storage not in self._parameters:
            self._seen.add(storage)
            self._alive.append(kept)
            if storage in self._copies:
                name = "copies_cut" if self._copies[storage] else "copies"
            else:
                name = "saved_cut" if self._inside and storage not in self._whole else "saved"
            self._now[name] += kept.untyped_storage().nbytes()
            if self._inside and storage in self._entered:
                self._now["entered"] += kept.untyped_storage().nbytes()
                self._now["gathered"] += kept.untyped_storage().nbytes() * (not self._gathered)
                self._gathered = True
        return kept

    def shapes(self, tokens, logits):
        """The Shapes of what has been seen."""
        for parameter in self._parameters.values():
            if not self._users[id(parameter)]:
                self._last["parameters"] += parameter.numel()
                self._last["cut"] += parameter.numel() * (id(parameter) in self._cut)
                self._last["frozen"] += parameter.numel() * (not parameter.requires_grad)
        tied = sum(parameter.numel() for parameter in self._parameters.values()
                   if len(self._users[id(parameter)]) > 1)  # fmt: skip
        first, *blocks, last = (_of_one(part) for part in (self._first, *self._blocks, self._last))
        return Shapes(first, tuple(blocks), last, tied, logits, max(block.entering for block in blocks), tokens)


def _of_one(part):
    """The Part of one sequence."""
    whole = ("parameters", "cut", "frozen", "copies", "copies_cut", "meetings", "calls", "attentions")
    return Part(**{name: value if name in whole else value / _ROWS for name, value in part.items()})


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _bytes(tensor):
    return tensor.numel() * tensor.element_size()

"""Tensor parallelism: the ranks of an axis share the heads, features and vocabulary of every layer.

The modules of a transformers model stay what they are; their weights are cut, and the borders of a region are hung
on them as hooks (`regions`). Which are cut how: transformers' own plan where a family has one, ours for others.
Weights stay plain tensors, so that DDP, FSDP2 and pipelining need not know.
"""

import contextlib
import fnmatch

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from ..errors import UsageError
from . import sharding, small, vocabulary
from .pieces import Piece, cut
from .regions import OwnRandomness, divide, enter, gather, join, leave, scatter

# Patterns of module names; the embeddings are found by transformers' accessors. "column": its outputs are shared out;
# "row": its inputs are, and what it gives is a sum; "packed": a column of queries, keys and values side by side;
# "heads": an embedding of a number a head; "experts": a module of them, whose weights are stacks of matrices.
_BERT = {
    "*.attention.self.query": "column",
    "*.attention.self.key": "column",
    "*.attention.self.value": "column",
    "*.intermediate.dense": "column",
    "*.output.dense": "row",
}
_T5 = {
    **{f"*Attention.{name}": "column" for name in "qkv"},
    "*Attention.o": "row",
    "*.relative_attention_bias": "heads",
    "*.DenseReluDense.wi*": "column",
    "*.DenseReluDense.wo": "row",
}
PLANS = {
    "bert": _BERT,
    "gpt2": {"*.attn.c_attn": "packed", "*.mlp.c_fc": "column", "*.c_proj": "row"},
    "t5": _T5,
}
_THEIRS = {"colwise": "column", "rowwise": "row", "ep_dispatch_experts": "experts"}
# What enters a region: the first argument, or one of these names; and what another stack of layers has made.
_ENTERING = ("hidden_states", "x")
_ENTERING_WHOLE = ("key_value_states", "encoder_hidden_states")
# Counts of heads and features that forward uses, in the modules that hold the cut layers.
_COUNTS = ("split_size", "n_heads", "num_heads", "inner_dim")


def plan(config):
    """{pattern of module names: how it is cut} for a transformers configuration. Raises UsageError without one."""
    kind = config.model_type
    if kind in PLANS:
        return PLANS[kind]
    theirs = getattr(config, "base_model_tp_plan", None)
    if not theirs:
        raise UsageError(f"parallel: tensor: neither hpcllm nor transformers has a plan for {kind}; set tensor to 1")
    # Experts are dealt out whole, as in transformers' other plan: no expert is cut, as the matrices may be small.
    dealt = {name: how for name, how in (getattr(config, "base_model_ep_plan", None) or {}).items() if how in _THEIRS}
    theirs = {n: how for n, how in theirs.items() if not any(f"{n}.".startswith(f"{e}.") for e in dealt)} | dealt
    unknown = sorted(set(theirs.values()) - set(_THEIRS))
    if unknown:
        raise UsageError(f"parallel: tensor: the plan of {kind} needs {', '.join(unknown)}, which hpcllm has not")
    return {f"*{pattern}": _THEIRS[how] for pattern, how in theirs.items()}


def check(config, size, sequence=False):
    """Raise UsageError, with the numbers, for a model configuration whose heads or experts `size` ranks cannot share.

    sequence: with slices of the sequence between regions.
    """
    for name in ("num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts"):
        count = getattr(config, name, None)
        if count is not None and count % size:
            raise UsageError(f"parallel: tensor ({size}) does not divide the model's {name} ({count})")
    if sequence and "experts" in plan(config).values():
        raise UsageError(
            f"parallel: sequence: experts of {config.model_type} take tokens of all slices; set sequence to false"
        )


def split(model, group, sequence=False, checkpointing=False):
    """Cut `model`, which is whole and the same on all ranks of `group`, into this rank's part, in place.

    sequence: outside of regions are slices of the sequence, see `divide_blocks`; checkpointing: backward computes
    activations again.

    Returns {parameter name: pieces.Piece} of the parameters that were cut. Raises UsageError before it changes
    anything. Collective only when the model runs.
    """
    size, index = dist.get_world_size(group), dist.get_rank(group)
    check(model.config, size, sequence)
    patterns = plan(model.config)
    modules = [
        (name, module, how)
        for name, module in model.named_modules()
        for pattern, how in patterns.items()
        if fnmatch.fnmatch(name, pattern)
    ]
    # The modules whose inputs enter a region: those that hold columns, each once, in order.
    regions = list(dict.fromkeys(name.rpartition(".")[0] for name, _, how in modules if how in ("column", "packed")))
    _refuse_what_would_be_wrong(model, modules, regions)
    cutter = _Cutter(model, size, index)
    random = OwnRandomness(index) if _drops(model.config) and not sequence else None
    for _, module, how in modules:
        columns = int(isinstance(module, nn.Linear | nn.Embedding))  # transformers' Conv1D keeps its weight [in, out]
        if how == "row":
            cutter.cut(module, "weight", columns)
            _sum_rows(module, group, scatter if sequence else leave, random)
            continue
        if how == "heads":
            cutter.cut(module, "weight", 1)
            continue
        if how == "experts":
            _deal_experts(module, cutter, group)
            continue
        packed = 3 if how == "packed" else 1
        cutter.cut(module, "weight", 1 - columns, packed)
        if module.bias is not None:
            cutter.cut(module, "bias", 0, packed)
        if not columns:
            module.nf = module.weight.shape[1]  # what Conv1D gives its outputs their shape by
    for name in regions:
        module = model.get_submodule(name)
        take = _gathering(module, checkpointing) if sequence else enter
        module.register_forward_pre_hook(_entering(group, random, take), with_kwargs=True)
        for count in _COUNTS:
            if isinstance(getattr(module, count, None), int):
                setattr(module, count, getattr(module, count) // size)
    _share_words(model, cutter, group)
    return cutter.pieces


def split_to_ask(model, group):
    """As `split`, of a model that gives logits of the whole vocabulary on every rank and is never trained."""
    split(model, group)
    head = model.get_output_embeddings()
    if head is not None:
        vocabulary.gather(head)


def _refuse_what_would_be_wrong(model, modules, regions):
    """Raise UsageError, the same on every rank, for a model that does more than its plan says."""
    kind, known = model.config.model_type, {name for name, _, _ in modules}
    one_by_one = getattr(model.config, "_experts_implementation", None) not in ("grouped_mm", "batched_mm")
    if one_by_one and any(how == "experts" for _, _, how in modules):
        # Weights that no token has chosen would get no gradients, and ranks of the data axis wait for each other's.
        raise UsageError(
            f"parallel: tensor: {kind} computes its experts one by one here, not all at once; set tensor to 1"
        ).known_to_all()
    for region in regions:
        for name, module in model.get_submodule(region).named_modules(prefix=region):
            if name not in known and any(True for _ in module.parameters(recurse=False)):
                # Each rank would see the gradients of its own heads or features alone.
                raise UsageError(f"parallel: tensor: {kind} has {name}, which its plan leaves out").known_to_all()
    embedding = model.get_input_embeddings()
    if embedding is not None and type(embedding).forward is not nn.Embedding.forward:
        raise UsageError(
            f"parallel: tensor: the embedding of {kind} ({type(embedding).__name__}) does more than look words up"
        ).known_to_all()


def _drops(config):
    """True where any dropout is on."""
    values = config.to_dict().items()
    return any(isinstance(value, float) and value > 0 for name, value in values if "drop" in name)


class _Cutter:
    """Replaces parameters by this rank's pieces of them, in all modules that share them."""

    def __init__(self, model, size, index):
        self.pieces, self._size, self._index = {}, size, index
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._places = {}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._places.setdefault(id(parameter), []).append((module, key))
        self._cut = set()

    def cut(self, module, key, dim, packed=1):
        """Cut the parameter `key` of `module` along `dim`; returns its Piece."""
        parameter = getattr(module, key)
        if id(parameter) in self._cut:
            return self.pieces[self._names[id(parameter)]]
        piece = cut(parameter.shape, dim, self._size, self._index, packed)
        mine = nn.Parameter(piece.take(parameter.detach()), requires_grad=parameter.requires_grad)
        self._cut.add(id(mine))
        self._names[id(mine)] = name = self._names[id(parameter)]
        self._places[id(mine)] = self._places.pop(id(parameter))
        self.pieces[name] = piece
        for holder, place in self._places[id(mine)]:
            holder._parameters[place] = mine
        return piece


def _entering(group, random, take):
    def hook(module, arguments, named):
        if random is not None and module.training:
            random.enter()
        if arguments:
            arguments = (take(arguments[0], group), *arguments[1:])
        for name in (*_ENTERING, *_ENTERING_WHOLE):
            if isinstance(named.get(name), torch.Tensor):
                named[name] = (take if name in _ENTERING else enter)(named[name], group)
        return arguments, named

    return hook


def _gathering(module, checkpointing):
    """As regions.gather, for what enters the region `module`, which keeps no more of it for backward than it must."""
    inside = contextlib.ExitStack()

    def take(part, group):
        whole, kept = gather(part, group)
        if not checkpointing:
            inside.enter_context(kept)
        return whole

    module.register_forward_hook(lambda *_: inside.close(), always_call=True)
    return take


def divide_blocks(model, group):
    """Between the blocks of `model`, cut for it by `split`, each rank of `group` has a slice of the sequence.

    What is before the first and after the last block of a stack sees all of it, as masks and positions do.
    """
    random = OwnRandomness(dist.get_rank(group)) if _drops(model.config) else None

    def begin(module, arguments):
        if random is not None and module.training:
            random.enter()
        return (divide(arguments[0], group), *arguments[1:])

    def end(module, arguments, left):
        if random is not None:
            random.leave()
        return (join(left[0], group), *left[1:]) if isinstance(left, tuple) else join(left, group)

    for blocks in sharding.stacks(model):
        blocks[0].register_forward_pre_hook(begin)
        blocks[-1].register_forward_hook(end)


def try_slices(model, group, device):
    """Raise UsageError, the same on every rank, for a model that does more between its regions than look at tokens one
    by one. device: where the ranks can talk. Collective."""
    size, index = dist.get_world_size(group), dist.get_rank(group)
    tokens = torch.arange(4 * size, device=device).remainder(15).view(2, -1) + 1
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})

    def whole(small):
        return small(**inputs).logits.tensor_split(size, -1)[index]

    def in_slices(small):
        split(small, group, sequence=True)
        divide_blocks(small, group)
        return small(**inputs).logits

    what = "between its regions than its plan says"
    small.refuse_unless_same(model, "sequence", whole, in_slices, what, group, device, plain="false")


def _sum_rows(module, group, leave, random):
    """Make a linear layer (or transformers' Conv1D) whose inputs are shared out give the sum of all parts."""
    linear = isinstance(module, nn.Linear)

    def forward(features):
        if random is not None:
            random.leave()
        part = functional.linear(features, module.weight) if linear else features @ module.weight
        total = leave(part, group)
        # Once, not once a rank, and in the precision that the layer computes in.
        return total if module.bias is None else total + module.bias.to(total.dtype)

    module.forward = forward


def _deal_experts(module, cutter, group):
    """Make a module of experts compute those of this rank, and give the sum of what all have computed."""
    for key, _ in list(module.named_parameters(recurse=False)):
        ((start, stop),) = cutter.cut(module, key, 0).ranges
    whole, module.num_experts = module.forward, stop - start
    module._is_expert_parallel = True  # transformers': the number behind the last expert's is that of nobody here

    def forward(hidden_states, top_k_index, top_k_weights):
        entered, weights = enter(hidden_states, group), enter(top_k_weights, group)
        mine = (top_k_index >= start) & (top_k_index < stop)
        numbers = torch.where(mine, top_k_index - start, stop - start)
        part = whole(entered, numbers, weights.masked_fill(~mine, 0.0))
        return leave(part, group)

    module.forward = forward


def _share_words(model, cutter, group):
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is not None:
        shared = embedding.weight
        same = [module for module in model.modules() if getattr(module, "weight", None) is shared]
        words = _words(cutter.cut(embedding, "weight", 0), group)
        for module in same:
            if isinstance(module, nn.Embedding):
                vocabulary.embed(module, words)
    if head is not None:
        words = _words(cutter.cut(head, "weight", 0), group)
        if head.bias is not None:
            cutter.cut(head, "bias", 0)
        vocabulary.classify(head, words)


def _words(piece: Piece, group):
    ((start, stop),) = piece.ranges
    return vocabulary.Words(start, stop, piece.shape[0], group)

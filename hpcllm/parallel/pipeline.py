"""Pipeline parallelism: the ranks of an axis hold different layers; a part of the model is made of the model itself.

A part is the transformers model with fewer layers in its lists, and with what comes before and after them replaced by
modules that let activations through; its parameters keep the names that they have in the whole model. Embeddings that
are also the output layer's weights, and what else several layers share, are held by every part that uses them.
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from ..errors import UsageError
from . import small
from .balance import balance
from .regions import divide, join

# Families that have no plan of transformers' own: the list of layers, and what runs before and after it, by names below
# the base model. What is outside of the base model comes after.
PLANS = {
    "bert": (("embeddings",), "encoder.layer", ("pooler",)),
    "gpt2": (("wte", "wpe", "drop"), "h", ("ln_f",)),
}
_ENCODER_DECODER = ("t5",)


def check(config, stages, several_sharded=False):
    """Raise UsageError, with the numbers, for a configuration whose model cannot be cut into `stages`.

    several_sharded: a rank has several of them, whose weights are sharded.
    """
    kind = config.model_type
    if kind not in PLANS and kind not in _ENCODER_DECODER and not getattr(config, "base_model_pp_plan", None):
        raise UsageError(
            f"parallel: pipeline: neither hpcllm nor transformers has a plan for {kind}; set pipeline to 1"
        )
    layers = config.num_hidden_layers
    if kind in _ENCODER_DECODER:
        layers = config.num_layers + config.num_decoder_layers
        if several_sharded:
            raise UsageError(
                f"parallel: sharding and stages_per_rank: the stages of one rank share the positions' bias of {kind}, "
                "which FSDP2 cannot shard twice; set stages_per_rank to 1 or sharding to none"
            )
    if layers < stages:
        raise UsageError(f"parallel: pipeline x stages_per_rank = {stages} stages, but the model has {layers} layers")


def split(model, stages, shapes, targets=1.0):
    """`model` as a list of `stages` Parts of about the same work, which share its weights.

    shapes: {name: shape} of the parameters as no tensor axis has cut them, so that all ranks of that cut alike here;
    targets: fraction of the tokens that reach the output layer. Raises UsageError, the same on every rank, for a model
    whose parts one after the other are not the model.
    """
    _try_in_small(model)
    return _split(model, stages, shapes, targets)


def _split(model, stages, shapes, targets=1.0):
    cut = (_EncoderDecoder if model.config.model_type in _ENCODER_DECODER else _OneStack)(model, shapes)
    return [cut.part(bounds, number, stages) for number, bounds in enumerate(cut.bounds(stages, targets))]


def _try_in_small(model):
    """Some families do more between embeddings and layers than their plan says."""
    tokens = torch.arange(1, 5).unsqueeze(0)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})

    def in_two_parts(small):
        first, second = _split(small, 2, {name: parameter.shape for name, parameter in small.named_parameters()})
        return second(first((), inputs), inputs).logits

    what = "between its layers than its plan says"
    small.refuse_unless_same(model, "pipeline", lambda whole: whole(**inputs).logits, in_two_parts, what)


def take(model, stages, mesh, shapes, targets=1.0):
    """(this rank's Parts of `model`, {name: (pipeline ranks, their group)} of parameters that several ranks share).

    Stage s is on rank s % ranks of mesh["pipeline"]. Other arguments and errors: as `split`. Collective.
    """
    group, size, rank = mesh["pipeline"], mesh.layout.pipeline, mesh.place["pipeline"]
    parts, holders = split(model, stages, shapes, targets), {}
    for part in parts:
        for name, _ in part.named_parameters_of_whole():
            holder = holders.setdefault(name, set())
            if part.number % size in holder and mesh.layout.shard > 1:
                raise UsageError(
                    f"parallel: sharding and stages_per_rank: {name} is shared by two stages of one rank, which FSDP2 "
                    "cannot shard; set stages_per_rank to 1 or sharding to none"
                ).known_to_all()
            holder.add(part.number % size)
    together = {tuple(sorted(ranks)) for ranks in holders.values() if len(ranks) > 1}
    groups = {
        ranks: dist.new_group([dist.get_global_rank(group, r) for r in ranks], use_local_synchronization=True)
        for ranks in sorted(together)
        if rank in ranks
    }
    shared = {name: (ranks, groups[ranks]) for name, ranks in ((n, tuple(sorted(h))) for n, h in holders.items())
              if ranks in groups}  # fmt: skip
    return parts[rank::size], shared


def alone(model):
    """`model` as the Part that is all of it."""
    return Part(model, 0, 1, None, {})


class Part(nn.Module):
    """One stage of a model.

    model: transformers' model with the layers of this stage; first, last: whether it takes tokens, gives logits;
    names: {name of a parameter here: its name in the whole model} where they differ; slices: group whose ranks each
    take from and give to other stages a slice of the sequence; None: all of it.
    """

    def __init__(self, model, number, stages, run, names):
        super().__init__()
        self.model, self.number, self.first, self.last = model, number, number == 0, number == stages - 1
        self.names, self.slices = names, None
        self._run = run

    def forward(self, carry, inputs):
        """From what the stage before gave (tuple of tensors, empty for the first) and the model's keyword arguments:
        what the stage behind takes, or the model's output."""
        if self.slices is None:
            return self._run(self, carry, inputs)
        # Whole for a moment: its model takes from it how long masks are and what the positions.
        output = self._run(self, [join(tensor, self.slices) for tensor in carry], inputs)
        return output if self.last else tuple(divide(tensor, self.slices) for tensor in output)

    @property
    def heads(self):
        """The modules that give logits."""
        return [self.model.get_output_embeddings()] if self.last else []

    def named_parameters_of_whole(self):
        """As named_parameters(), under the names of the whole model."""
        return [(self.names.get(name, name), parameter) for name, parameter in self.model.named_parameters()]


class _Through(nn.Module):
    """In place of what other parts do: gives back what it is given."""

    def forward(self, first=None, *_, inputs_embeds=None, **__):
        return first if inputs_embeds is None else inputs_embeds


class _Nothing(nn.Module):
    """In place of an embedding that is added to others."""

    def forward(self, _):
        return torch.zeros(())


class _Layers(nn.ModuleList):
    """Some layers of a list, under the numbers that they have in it."""

    def __init__(self, numbered):
        super().__init__()
        for number, layer in numbered:
            self.add_module(str(number), layer)

    def __getitem__(self, index):
        return list(self)[index]


class _Cut:
    """What families have in common. lists: names of the lists of layers."""

    def __init__(self, model, shapes, lists):
        self.model, self.lists, self._shapes = model, lists, shapes
        self._whole = {id(parameter): name for name, parameter in model.named_parameters()}

    def copy(self):
        """The model once more: containers of its own, down to the lists, of the same modules."""
        own = {name[: end + 1].rstrip(".") for name in self.lists for end, sign in enumerate(f"{name}.") if sign == "."}
        shared = {id(module): module for name, module in self.model.named_modules() if name and name not in own}
        model = copy.deepcopy(self.model, shared)
        for name in own | {""}:
            if config := getattr(model.get_submodule(name), "config", None):
                config.use_cache = False  # layers have not the numbers that a cache knows them by
        return model

    def size(self, modules, share=1.0):
        """(floating point operations a token, parameters) of modules; an embedding looks up and has only the latter.

        share: of the tokens, that they see. Attention's own, which grow with the length, are the same in all layers.
        """
        counts, work = {}, 0
        for module in modules:
            looked_up = {id(inner.weight) for inner in module.modules() if isinstance(inner, nn.Embedding)}
            for parameter in module.parameters():
                shape = self._shapes[self._whole[id(parameter)]]
                counts[id(parameter)] = shape.numel()
                work += shape.numel() * (len(shape) == 2 and id(parameter) not in looked_up)
        return 6.0 * share * work, float(sum(counts.values()))

    def made(self, model, number, stages, run):
        names = {name: self._whole[id(parameter)] for name, parameter in model.named_parameters()}
        return Part(model, number, stages, run, {here: there for here, there in names.items() if here != there})


class _OneStack(_Cut):
    """Encoders and decoders: embeddings, layers, and what makes something of them."""

    def __init__(self, model, shapes):
        base = model.base_model_prefix
        before, layers, after = PLANS.get(model.config.model_type) or _theirs(model)
        super().__init__(model, shapes, [f"{base}.{layers}"])
        self.before = [f"{base}.{name}" for name in before]
        self.after = [f"{base}.{name}" for name in after] + [name for name, _ in model.named_children() if name != base]
        self.after = [name for name in self.after if _get(model, name) is not None]

    def bounds(self, stages, targets):
        costs = [self.size([layer]) for layer in self.model.get_submodule(self.lists[0])]
        costs[0] = _sum(costs[0], self.size([self.model.get_submodule(name) for name in self.before]))
        costs[-1] = _sum(costs[-1], self.size([self.model.get_submodule(name) for name in self.after], targets))
        return balance(costs, stages)

    def part(self, bounds, number, stages):
        model = self.copy()
        _keep(model, self.lists[0], range(*bounds))
        for name in self.before if number > 0 else ():
            _replace(model, name, _Nothing() if name.endswith(".wpe") else _Through())
        for name in self.after if number < stages - 1 else ():
            _replace(model, name, _Through())
        return self.made(model, number, stages, self.run)

    @staticmethod
    def run(part, carry, inputs):
        if not part.first:
            inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
            inputs["inputs_embeds"] = carry[0]
        output = part.model(**inputs)
        return output if part.last else (output.logits,)


def _theirs(model):
    """(names before the layers, name of the layers, names after them) as transformers' plan has them."""
    base = model.get_submodule(model.base_model_prefix)
    names = list(model.config.base_model_pp_plan)
    lists = [at for at, name in enumerate(names) if isinstance(_get(base, name), nn.ModuleList)]
    if len(lists) != 1:
        raise UsageError(
            f"parallel: pipeline: {model.config.model_type} has {len(lists)} lists of layers; one is known"
        )
    return names[: lists[0]], names[lists[0]], names[lists[0] + 1 :]


class _EncoderDecoder(_Cut):
    """T5: the decoder's layers follow the encoder's; what the encoder gives goes through all parts behind it."""

    def __init__(self, model, shapes):
        super().__init__(model, shapes, ["encoder.block", "decoder.block"])
        self._counts = [len(model.encoder.block), len(model.decoder.block)]

    def bounds(self, stages, targets):
        of = self.model
        costs = [[self.size([layer]) for layer in stack.block] for stack in (of.encoder, of.decoder)]
        for stack, sizes in zip((of.encoder, of.decoder), costs, strict=True):
            sizes[0] = _sum(sizes[0], self.size([stack.embed_tokens]))
        costs[1][-1] = _sum(costs[1][-1], self.size([of.lm_head], targets))
        return balance([*costs[0], *costs[1]], stages)

    def part(self, bounds, number, stages):
        model, (start, stop) = self.copy(), bounds
        encoders = self._counts[0]
        if start > 0:
            model.shared = _Through()
        for name, first in (("encoder", 0), ("decoder", encoders)):
            count = self._counts[name == "decoder"]
            here = range(max(start - first, 0), min(stop - first, count))
            if not here:
                setattr(model, name, _NoStack())
                continue
            stack = getattr(model, name)
            begins, ends = here[0] == 0, here[-1] == count - 1
            bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
            _keep(model, f"{name}.block", here)
            stack.dropout = _Border(stack.dropout, begins, ends)
            if not begins:
                stack.embed_tokens = _Through()
                # The positions' bias is a layer's of each stack; every part makes its own from the same weights.
                attention = stack.block[0].layer[0].SelfAttention
                attention.has_relative_attention_bias, attention.relative_attention_bias = True, bias
            if not ends:
                stack.final_layer_norm = _Through()
        if number < stages - 1:
            model.lm_head, model.config.scale_decoder_outputs = _Through(), False
        return self.made(model, number, stages, self.run)

    @staticmethod
    def run(part, carry, inputs):
        inputs = dict(inputs)
        if carry:
            del inputs["input_ids"]
            if isinstance(part.model.encoder, _NoStack):
                inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=carry[0])
            else:
                inputs["inputs_embeds"] = carry[0]
        if len(carry) > 1:
            del inputs["decoder_input_ids"]
            inputs["decoder_inputs_embeds"] = carry[1]
        output = part.model(**inputs)
        if part.last:
            return output
        encoded = output.encoder_last_hidden_state
        return (encoded,) if isinstance(part.model.decoder, _NoStack) else (encoded, output.logits)


class _NoStack(nn.Module):
    """In place of an encoder or decoder that is other parts'."""

    def forward(self, encoder_hidden_states=None, **_):
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=encoder_hidden_states)


class _Border(nn.Module):
    """The dropout that a stack of T5 applies to what comes in and to what goes out, where these are its borders."""

    def __init__(self, dropout, begins, ends):
        super().__init__()
        self.dropout, self._begins, self._ends, self._inside = dropout, begins, ends, False

    def forward(self, tensor):
        self._inside = not self._inside
        return self.dropout(tensor) if (self._begins if self._inside else self._ends) else tensor


def _get(model, name):
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _replace(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _keep(model, name, numbers):
    """Leave those layers of the list `name` that are in `numbers`."""
    numbered = [(number, layer) for number, layer in enumerate(model.get_submodule(name)) if number in numbers]
    _replace(model, name, _Layers(numbered))
    config = model.get_submodule(name.rpartition(".")[0]).config
    if getattr(config, "layer_types", None):  # which forward looks up by the layer's place
        config.layer_types = [config.layer_types[number] for number, _ in numbered]


def _sum(one, other):
    return tuple(map(sum, zip(one, other, strict=True)))

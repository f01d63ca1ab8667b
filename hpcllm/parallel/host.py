"""Sharding "host": the ranks of a host keep one copy of the weights between them, in memory that they all map.

Backward leaves each rank's gradients in memory that the others of its host can read. Then every rank adds up its slice
of all of them where they lie, updates its slice of the weights with its slice of the optimizer's state, and all meet:
in a host nothing is sent, and what is read and written once a step does not grow with the number of ranks. Over several
hosts each rank meets its counterparts with its slice: they exchange parts of it (reduce-scatter), each updates one, and
the new weights go to all (all-gather). The sums are those of `hpcllm.mpi` in every bit: hosts in order of ranks within,
and then the hosts.

Gradients go straight to their place: the modules of a model compute with stand-ins for its parameters (`_Use`), whose
gradient is copied there, or added after the first micro-batch. Where forward computes in bfloat16, the stand-in is a
copy of the weights in bfloat16 that is written once a step by all ranks together, and not once by each; a gradient of
an embedding touches the rows that were looked up and no others.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..mpi import reduce, shared, work
from .pieces import Piece

# Modules whose weights torch.autocast would turn into bfloat16 at every use.
_LOW_PRECISION = (nn.Linear, Conv1D)


def refusal(parallel, world, compile_blocks=False):
    """Why `parallel` (the run file's section) cannot have sharding "host" in this job, None if it can. Collective.

    compile_blocks: train.compile of the run file.
    """
    if world.device.type != "cpu":
        return "is for ranks that compute on the CPU"
    if parallel.backend != "mpi":
        return f'needs backend = "mpi", not "{parallel.backend}"'
    if parallel.tensor * parallel.pipeline * parallel.context > 1:
        return "goes with the data axis alone, without tensor, pipeline and context"
    if compile_blocks:
        # `_Gradient` remembers what has arrived, which torch.compile cannot put into a graph.
        return "goes with train.compile = false, for the graph of a block would break at each weight"
    counts = set(world.comm.allgather(world.local_size))
    neighbours = None if counts == {1} else world.group.neighbours()
    if counts != {1} and (neighbours is None or neighbours.reached is None):
        return "needs hosts with equal numbers of ranks, which may map each other's memory"
    return None


def resolve(parallel, world, compile_blocks=False):
    """`parallel` with sharding "auto" decided: "host" where that can be, else "none". Collective.

    Raises UsageError, the same on every rank, for "host" where it cannot be.
    """
    if parallel.sharding not in ("auto", "host"):
        return parallel
    why = refusal(parallel, world, compile_blocks)
    if why and parallel.sharding == "host":
        raise UsageError(f'parallel: sharding = "host" {why}').known_to_all()
    return parallel.model_copy(update={"sharding": "none" if why else "host"})


class _Gradient:
    """Where the gradient of a parameter is collected. fresh: nothing of this step is there yet."""

    def __init__(self, place):
        self.place, self.fresh = place, True

    def add(self, gradient):
        if self.fresh:
            self.place.copy_(gradient)
            self.fresh = False
        else:
            self.place.add_(gradient.to(self.place.dtype))  # torch adds unlike dtypes ten times slower

    def add_rows(self, rows, gradients):
        """Add `gradients` [n, width] to the `rows` (int64 [n])."""
        if self.fresh:
            self.place.zero_()
            self.fresh = False
        self.place.index_add_(0, rows, gradients.to(self.place.dtype))

    def finish(self):
        """What nobody has added to in a step is zero."""
        if self.fresh:
            self.place.zero_()
        self.fresh = True


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, values, gradient):
        ctx.gradient = gradient
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        ctx.gradient.add(gradient)
        return None, None, None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, padding, gradient):
        ctx.save_for_backward(ids)
        ctx.padding, ctx.gradient = padding, gradient
        return functional.embedding(ids, weight.detach())

    @staticmethod
    def backward(ctx, gradient):
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ids == ctx.padding).unsqueeze(-1), 0.0)
        ctx.gradient.add_rows(ids.flatten(), gradient.flatten(0, -2))
        return None, None, None, None


class OneCopy:
    """The weights of a model, their gradients, and who updates what.

    slices: {parameter name: the rows of it that this rank updates, an nn.Parameter}; pieces: {name: pieces.Piece of
    them}. All methods are collective.
    """

    checker = None  # see mpi.work.timed

    def __init__(self, model, group, low_precision, reduce_dtype=None):
        """Move the weights of `model` to memory that is shared, with their values, if they have any.

        group: hpcllm.mpi process group of all ranks; low_precision: forward runs under torch.autocast in bfloat16, at
        times at least; reduce_dtype: what gradients travel as between hosts, None for their own. Raises UsageError,
        the same on every rank, where there is not enough memory, and for parameters that are one number.
        """
        self.place, self.comm, self._near = group.place, group.comm, shared.near(group.comm)
        self._reduce_dtype = reduce_dtype
        self._hosts = len(self._near.table)
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if not parameter.shape:
                raise UsageError(
                    f'parallel: sharding = "host" cannot divide {name}, which is one number'
                ).known_to_all()
        low = {id(p) for m in model.modules() if isinstance(m, _LOW_PRECISION) for p in m.parameters(recurse=False)}
        # First those that have a copy in bfloat16, then the others; what is trained lies together: stretches of memory.
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        order = sorted(parameters, key=lambda n: (n in trained) if id(parameters[n]) in low else 3 - (n in trained))
        shapes = {name: parameters[name].shape for name in order}
        ends = list(itertools.accumulate(shape.numel() for shape in shapes.values()))
        self._starts, length = dict(zip(order, [0, *ends], strict=False)), ends[-1]
        low_length = sum(shapes[name].numel() for name in order if id(parameters[name]) in low) if low_precision else 0
        reached = self._near.reached
        starts = [self._starts[name] for name in order if name in trained]
        self._trained = starts[0], starts[0] + sum(shapes[name].numel() for name in trained)
        self._all = self._changed = 0, length
        self._weights = reached.first(length, torch.float32)
        self._gradients = reached.each(self._trained[1] - self._trained[0], torch.float32)
        self._low = reached.first(max(1, low_length), torch.bfloat16)
        there = all(memory is not None for memory in (self._weights, self._gradients, self._low))
        if not all(self.comm.allgather(there)):
            raise UsageError(
                f'parallel: sharding = "host": {length} weights once, and their gradients on each of '
                f"{self._near.local_size} ranks, do not fit into the memory of a host"
            ).known_to_all()
        self._low = self._low[:low_length]
        self._cuts = _cuts(shapes, self._near.size)
        self._host = self._near.table.index(self._near.here)
        mine = self._gradients[self._near.me]
        places = {name: self._view(mine, name, shapes[name], self._trained[0]) for name in trained}
        self._collected = {name: _Gradient(places[name]) for name in order if name in trained}
        self.slices, self.pieces = {}, {}
        for name, shape in shapes.items():
            self._divide(name, shape, parameters[name])
        self._take_over(model, {id(parameter): name for name, parameter in parameters.items()}, shapes)

    def _view(self, flat, name, shape, first=0):
        start = self._starts[name] - first
        return flat[start : start + shape.numel()].view(shape)

    def _of(self, host):
        """Where the part begins and ends, among all weights, that this rank (or its counterpart on `host`) updates."""
        number = self._near.me * self._hosts + host
        return self._cuts[number], self._cuts[number + 1]

    def _slice(self):
        """Where what this rank and its counterparts on all hosts update begins and ends."""
        return self._of(0)[0], self._of(self._hosts - 1)[1]

    def _summed(self, part):
        """Where, among gradients, those of a part of all weights begin and end."""
        return tuple(at - self._trained[0] for at in _within(part, self._trained))

    def _divide(self, name, shape, old):
        row, length = shape[1:].numel(), shape.numel()
        begin, end = (min(max(cut - self._starts[name], 0), length) // row for cut in self._of(self._host))
        part = self._view(self._weights, name, shape)[begin:end]
        if not old.is_meta:
            part.copy_(old.detach()[begin:end])
        self.slices[name] = nn.Parameter(part, requires_grad=old.requires_grad)
        self.pieces[name] = Piece(shape, 0, ((begin, end),))

    def _take_over(self, model, names, shapes):
        """Have the modules of `model` compute with the shared weights. names: {id of a parameter: its name}."""
        self._whole = whole = {}
        for module in model.modules():
            uses = {key: names[id(p)] for key, p in module._parameters.items() if p is not None}
            for key, name in uses.items():
                if name not in whole:
                    values = self._view(self._weights, name, shapes[name])
                    whole[name] = nn.Parameter(values, requires_grad=module._parameters[key].requires_grad)
                    if whole[name].requires_grad:
                        whole[name].register_post_accumulate_grad_hook(_moved_to(self._collected[name]))
                module._parameters[key] = whole[name]
            if type(module) is nn.Embedding and not (module.scale_grad_by_freq or module.max_norm):
                gradient = self._collected.get(uses["weight"])
                module.forward = lambda ids, m=module, g=gradient: _LookUp.apply(m.weight, ids, m.padding_idx, g)
            elif uses:
                self._stand_in(module, {key: (whole[name], name) for key, name in uses.items()})

    def _stand_in(self, module, uses):
        low = self._low.numel() and isinstance(module, _LOW_PRECISION)
        given = []
        for key, (parameter, name) in uses.items():
            values = self._view(self._low, name, parameter.shape) if low else parameter.detach()
            given.append((key, parameter, parameter.detach(), values, self._collected.get(name)))

        def before(module, _):
            lower = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
            for key, parameter, full, values, gradient in given:
                # Found before the parameter of that name.
                module.__dict__[key] = _Use.apply(parameter, values if lower else full, gradient)

        def after(module, *_):
            for key, *_ in given:
                module.__dict__.pop(key, None)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def changed(self):
        """The slices have other values than the copies that are made of them."""
        self._changed = self._all

    @work.timed
    def add_up(self):
        """Leave the sum of all ranks' gradients in those of this rank's slices."""
        for gradient in self._collected.values():
            gradient.finish()
        self._near.memory.meet()
        mine, (begin, end) = self._gradients[self._near.me], self._summed(self._slice())
        if self._near.across is None:
            reduce.fold([given[begin:end] for given in self._gradients], reduce.SUM, mine[begin:end])
        else:
            self._add_up_between_hosts(mine)
        for name, part in self.slices.items():
            if part.requires_grad:
                ((first, last),) = self.pieces[name].ranges
                part.grad = self._collected[name].place[first:last]
        self._changed = self._changed or self._trained

    def _add_up_between_hosts(self, mine):
        """Each host's sum of a part goes to the rank that updates it."""
        parts = [self._summed(self._of(host)) for host in range(self._hosts)]
        longest = max(end - begin for begin, end in parts)
        step = max(1, reduce.CHUNK_BYTES // (self._hosts * mine.element_size()))
        for offset in range(0, longest, step):
            rounds = [(min(begin + offset, end), min(begin + offset + step, end)) for begin, end in parts]
            counts = [end - begin for begin, end in rounds]
            sent = torch.empty(sum(counts), dtype=mine.dtype)
            for (begin, end), total in zip(rounds, sent.split(counts), strict=True):
                reduce.fold([given[begin:end] for given in self._gradients], reduce.SUM, total)
            sent = sent.to(self._reduce_dtype or sent.dtype)
            begin, end = rounds[self._host]
            received = torch.empty((self._hosts, end - begin), dtype=sent.dtype)
            reduce.exchange(self._near.across, sent, counts, received, [end - begin] * self._hosts)
            reduce.fold(received.to(mine.dtype).unbind(0), reduce.SUM, mine[begin:end])

    def ready(self):
        """Let every rank see what all have updated, before the weights are used again."""
        if self._changed:
            self._publish()
            self._changed = None

    def my_part_of_all(self):
        """(number of this rank in its host, {name: weights}): every n-th of all weights that the host's n ranks share.

        Ranks of one number have the same ones. Everybody's updates are there after `ready`.
        """
        mine = list(self._whole.items())[self._near.me :: self._near.local_size]
        return self._near.me, {name: used.detach() for name, used in mine}

    @work.timed
    def _publish(self):
        parts = [_within(self._of(host), self._changed) for host in range(self._hosts)]
        begin, end = parts[0][0], parts[-1][1]
        if self._near.across is not None:
            sizes = [stop - start for start, stop in parts]
            reduce.gather_in_place(self._near.across, self._weights[begin:end], sizes)
        end = min(end, len(self._low))
        if begin < end:
            self._low[begin:end].copy_(self._weights[begin:end])
        self._near.memory.meet()


def _within(part, stretch):
    """Where what a part has of a stretch begins and ends."""
    return tuple(min(max(at, stretch[0]), stretch[1]) for at in part)


def _moved_to(gradient):
    """For what reaches a parameter itself, being computed with outside of the module that has it."""

    def move(parameter):
        if parameter.grad is not None:  # torch calls this for a stand-in's as well, which is elsewhere by then
            gradient.add(parameter.grad)
            parameter.grad = None

    return move


def _cuts(shapes, count):
    """Where `count` parts of all weights begin, and the end: as equal as whole rows of parameters allow."""
    length, cuts, at = sum(shape.numel() for shape in shapes.values()), [], 0
    for shape in shapes.values():
        row = shape[1:].numel()
        while len(cuts) < count and len(cuts) * length // count < at + shape.numel():
            cuts.append(at + (len(cuts) * length // count - at) // row * row)
        at += shape.numel()
    return [*cuts, length]

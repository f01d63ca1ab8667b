"""Micro-batches through the stages of this rank, in the order of a schedule. Gradient accumulation is the case of one.

Stages talk point to point, without waiting for what they send; what a rank receives from another comes in the order in
which that one sends, which the schedule tells, so no tags are needed. (NCCL, which has none, is meant to do
as well as MPI and Gloo, which are tested.)
"""

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..mpi.device import reseed
from .deferred import Deferred
from .schedules import BACKWARD, FORWARD, INPUT, WEIGHT, actions

_APART = 0x9E3779B97F4A7C15  # odd and large: seeds of stages are far from those of other micro-batches
_HEADER = 64  # int64 elements: the number of tensors, and for each its dtype, dims and shape
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Work:
    """What there is to do with a micro-batch, whatever that is for the caller.

    inputs(batch): the model's keyword arguments; loss(net, batch): what is wanted of the last stage, a scalar tensor to
    train, anything to evaluate, `net` being called with `inputs`; seed(batch): for dropout, None for none;
    arithmetic(): the context to compute in.
    """

    inputs: Callable
    loss: Callable
    seed: Callable
    arithmetic: Callable


class _Net:
    """The last stage, as what a loss function calls: a model that takes `inputs`."""

    def __init__(self, part, carry):
        self.module, self._part, self._carry = part.model, part, carry

    def __call__(self, **inputs):
        return self._part(self._carry, inputs)


class Runner:
    """Runs the stages that this rank has of a Placed model; remembers the shapes that ranks have told each other."""

    def __init__(self, placed, schedule, device):
        """schedule: as in `schedules`; device: where activations are."""
        self.placed, self.device, self._schedule = placed, device, schedule
        self.size, self._groups = placed.mesh.layout.pipeline, placed.mesh.groups
        self.rank, self._chunks = placed.mesh.place["pipeline"], len(placed.parts)
        self.last = self.size * self._chunks - 1
        self.outlines = {}  # {_Turn._key of a forward message: _outline of its tensors}

    def run(self, batches, work, divisor=None):
        """What `work.loss` gives for each of `batches`, on the rank of the last stage; elsewhere an empty list.

        divisor: gradients of the losses, divided by it, are added to those of the weights; None: evaluation.
        Collective over the pipeline.
        """
        self.placed.ready()
        schedule = "forward" if divisor is None else self._schedule
        orders = actions(schedule, self.size, self._chunks, len(batches))
        turn = _Turn(self, orders, batches, work, divisor)
        for action in orders[self.rank]:
            turn.take(action)
        return turn.end()

    def way(self, sender, receiver):
        """The group that carries messages from one rank of the pipeline to another."""
        return self._groups["pipeline" if sender < receiver else "backwards"]


class _Turn:
    """One run. What is under way in it: activations by (stage, micro-batch), and messages."""

    def __init__(self, runner, orders, batches, work, divisor):
        self._runner, self._placed, self._rank, self._size = runner, runner.placed, runner.rank, runner.size
        self._batches, self._work, self._divisor = batches, work, divisor
        self._held, self._deferred, self._results = {}, {}, {}
        self._sent, self._here, self._awaited, self._given = deque(), {}, {}, {}
        self._coming = [deque(self._messages(order, self._rank)) for order in orders]
        self._defers = any(action.kind == WEIGHT for action in orders[self._rank])

    def take(self, action):
        part = self._placed.parts[action.stage // self._size]
        last = action.micro_batch == len(self._batches) - 1
        if action.kind == WEIGHT:
            self._deferred.pop(action[1:]).run()
        elif action.kind == FORWARD:
            with self._placed.micro_batch(part, last), torch.set_grad_enabled(self._divisor is not None):
                self._forward(part, *action[1:])
        else:
            with self._placed.micro_batch(part, last):
                self._backward(part, *action)

    def end(self):
        for work, _ in self._sent:
            work.wait()
        return [self._results[number] for number in sorted(self._results)]

    def _forward(self, part, stage, number):
        batch, deferred = self._batches[number], Deferred(part.heads) if self._defers else contextlib.nullcontext()
        carry = () if part.first else self._receive((FORWARD, stage, number), (stage - 1) % self._size)
        if self._divisor is not None:
            carry = [tensor.requires_grad_() for tensor in carry]
        seed = self._work.seed(batch)
        if seed is not None:  # stages must not draw the same numbers, nor parts of a sequence
            apart = stage + self._placed.mesh.place["context"] * (self._runner.last + 1)
            reseed((seed + apart * _APART) % (1 << 63))
        with self._work.arithmetic(), deferred:
            if not part.last:
                output = part(carry, self._inputs(number))
            else:
                output = self._work.loss(self._net(part, carry), batch)
        if part.last:
            self._results[number] = output if self._divisor is None else output.detach()
        else:
            self._send((FORWARD, stage + 1, number), output)
        if self._divisor is not None:
            self._held[stage, number] = carry, output, deferred

    def _inputs(self, number):
        if number not in self._given:  # to a GPU they go once
            self._given[number] = self._work.inputs(self._batches[number])
        return self._given[number]

    def _net(self, part, carry):
        if not part.first:
            return _Net(part, carry)
        return part.model if self._divisor is None else self._placed.replica

    def _backward(self, part, kind, stage, number):
        gradients = None if part.last else self._receive((BACKWARD, stage, number), (stage + 1) % self._size)
        carry, output, deferred = self._held.pop((stage, number))
        torch.autograd.backward(output / self._divisor if part.last else output, gradients)
        if not part.first:
            self._send((BACKWARD, stage - 1, number), [tensor.grad for tensor in carry])
        if kind == INPUT:
            self._deferred[stage, number] = deferred

    # Messages are (kind, stage that it is for, micro-batch).

    def _messages(self, order, receiver):
        """What a rank with the turns `order` sends to `receiver`, in order."""
        for kind, stage, number in order:
            if kind == FORWARD and stage < self._runner.last:
                message = FORWARD, stage + 1, number
            elif kind in (BACKWARD, INPUT) and stage > 0:
                message = BACKWARD, stage - 1, number
            else:
                continue
            if message[1] % self._size == receiver:
                yield message

    def _send(self, message, tensors):
        receiver = message[1] % self._size
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        if receiver == self._rank:
            self._here[message] = [tensor.clone() for tensor in tensors]
            return
        if message[0] == FORWARD and (key := self._key(message)) not in self._runner.outlines:
            self._runner.outlines[key] = _outline(tensors)
            tensors.insert(0, _header(_outline(tensors), self._runner.device))
        group = self._runner.way(self._rank, receiver)
        for tensor in tensors:
            self._sent.append((dist.isend(tensor, group=group, group_dst=receiver), tensor))
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()

    def _receive(self, message, sender):
        """The tensors of `message`, once they are here; the next that `sender` will send is waited for meanwhile."""
        while message not in self._here:
            arriving, works, tensors = self._awaited.pop(sender, None) or self._await(sender)
            for work in works:
                work.wait()
            self._here[arriving] = tensors
            if self._coming[sender] and self._outline(self._coming[sender][0]):
                self._awaited[sender] = self._await(sender)
        return self._here.pop(message)

    def _await(self, sender):
        message, group = self._coming[sender].popleft(), self._runner.way(sender, self._rank)
        outline = self._outline(message)
        if outline is None:
            header = torch.empty(_HEADER, dtype=torch.int64, device=self._runner.device)
            dist.recv(header, group=group, group_src=sender)
            outline = self._runner.outlines[self._key(message)] = _read(header)
        tensors = [torch.empty(shape, dtype=dtype, device=self._runner.device) for dtype, shape in outline]
        return message, [dist.irecv(tensor, group=group, group_src=sender) for tensor in tensors], tensors

    def _outline(self, message):
        """Of a message to this rank; None where it is not known yet."""
        if message[0] == FORWARD:
            return self._runner.outlines.get(self._key(message))
        held = self._held.get(message[1:])  # gradients are as what this rank has sent
        return held and _outline(held[1])

    def _key(self, message):
        """What the shapes of a forward message depend on, which both sides know."""
        kind, stage, number = message
        shapes = tuple((name, value.shape) for name, value in self._inputs(number).items() if torch.is_tensor(value))
        return kind, stage, self._divisor is None, shapes


def _outline(tensors):
    """[(dtype, shape)] of tensors."""
    return [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]


def _header(outline, device):
    numbers = [len(outline)]
    for dtype, shape in outline:
        numbers += [_DTYPES.index(dtype), len(shape), *shape]
    return torch.tensor(numbers + [0] * (_HEADER - len(numbers)), dtype=torch.int64, device=device)


def _read(header):
    numbers = iter(header.tolist())
    count = next(numbers)
    return [(_DTYPES[next(numbers)], tuple(next(numbers) for _ in range(next(numbers)))) for _ in range(count)]

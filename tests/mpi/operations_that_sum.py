"""The operations of torch.distributed that add up, and those that torch composes: coalesced, functional, gradients.

As in `operations`, each is performed once and returns pairs of what it gave and what it should have given. Not a test.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from operations import FLOAT8, Operation
from rank_tensors import COMPLEX, FLOATS, INTEGERS, UNSIGNED, expected
from torch.distributed.nn import functional as differentiable

KINDS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM")


# ---- what adds up


def _op(kind):
    return dist._make_nccl_premul_sum(0.5) if kind == "PREMUL_SUM" else getattr(dist.ReduceOp, kind)


def _reduced(kind, tensors):
    return expected("SUM", [tensor * 0.5 for tensor in tensors]) if kind == "PREMUL_SUM" else expected(kind, tensors)


def _answer(kind, torch_looks=False):
    """What a reduction does with each dtype. torch_looks: whether torch refuses what complex numbers do not have."""
    bitwise = kind in ("BAND", "BOR", "BXOR")

    def answer(dtype):
        if torch_looks and dtype.is_complex and kind not in ("SUM", "AVG", "PREMUL_SUM"):
            return "torch"
        has_none = (
            dtype in FLOAT8
            or (dtype is torch.bool and kind in ("AVG", "PREMUL_SUM"))
            or (dtype in UNSIGNED and kind in ("AVG", "MIN", "MAX", "PREMUL_SUM"))
            or (dtype in INTEGERS and kind == "PREMUL_SUM")
            or (dtype in FLOATS and bitwise)
            or (dtype in COMPLEX and (bitwise or kind in ("MIN", "MAX")))
        )
        return "refused" if has_none else "right"

    return answer


def _whole(t):
    return [t.of(rank, 2, 3) for rank in t.ranks]


def all_reduce(kind):
    def attempt(t):
        tensor = t.of(t.rank, 2, 3)
        t.done(dist.all_reduce(tensor, _op(kind), async_op=t.asynchronous))
        return [(tensor, _reduced(kind, _whole(t)))]

    return Operation(f"all_reduce {kind}", attempt, answer=_answer(kind, torch_looks=True))


def all_reduce_coalesced(kind):
    def attempt(t):
        tensors = [t.of(t.rank, 2, 3), t.of(t.rank, 5, salt=1)]
        t.done(dist.all_reduce_coalesced(tensors, _op(kind), async_op=t.asynchronous))
        others = [t.of(rank, 5, salt=1) for rank in t.ranks]
        return [(tensors[0], _reduced(kind, _whole(t))), (tensors[1], _reduced(kind, others))]

    return Operation(f"all_reduce_coalesced {kind}", attempt, answer=_answer(kind, torch_looks=True))


def reduce(kind):
    def attempt(t):
        tensor = t.of(t.rank, 2, 3)
        t.done(dist.reduce(tensor, t.size - 1, _op(kind), async_op=t.asynchronous))
        return [(tensor, _reduced(kind, _whole(t)) if t.rank == t.size - 1 else t.of(t.rank, 2, 3))]

    return Operation(f"reduce {kind}", attempt, answer=_answer(kind))


def reduce_scatter(kind):
    def attempt(t):
        output = t.blank(2, 3)
        parts = [t.of(t.rank, 2, 3, salt=rank) for rank in t.ranks]
        t.done(dist.reduce_scatter(output, parts, _op(kind), async_op=t.asynchronous))
        return [(output, _reduced(kind, [t.of(rank, 2, 3, salt=t.rank) for rank in t.ranks]))]

    return Operation(f"reduce_scatter {kind}", attempt, answer=_answer(kind))


def reduce_scatter_uneven(t):
    output = t.blank(t.rank + 1, 3)
    parts = [t.of(t.rank, rank + 1, 3, salt=rank) for rank in t.ranks]
    t.done(dist.reduce_scatter(output, parts, async_op=t.asynchronous))
    return [(output, _reduced("SUM", [t.of(rank, t.rank + 1, 3, salt=t.rank) for rank in t.ranks]))]


def _my_rows(t, kind):
    return _reduced(kind, [t.of(rank, 2 * t.size, 3)[2 * t.rank : 2 * t.rank + 2] for rank in t.ranks])


def reduce_scatter_tensor(kind):
    def attempt(t):
        output = t.blank(2, 3)
        t.done(dist.reduce_scatter_tensor(output, t.of(t.rank, 2 * t.size, 3), _op(kind), async_op=t.asynchronous))
        return [(output, _my_rows(t, kind))]

    return Operation(f"reduce_scatter_tensor {kind}", attempt, answer=_answer(kind))


# ---- coalesced by torch's context manager


def _coalesced(t, calls):
    with dist._coalescing_manager(async_ops=t.asynchronous) as manager:
        for call in calls:
            call()
    if t.asynchronous:
        manager.wait()


def coalescing_all_reduce(t):
    tensors = [t.of(t.rank, 2, 3), t.of(t.rank, 2, 3)]
    _coalesced(t, [lambda tensor=tensor: dist.all_reduce(tensor) for tensor in tensors])
    return [(tensor, _reduced("SUM", _whole(t))) for tensor in tensors]


def coalescing_all_gather(t):
    outputs = [t.blank(2 * t.size, 3) for _ in range(2)]
    _coalesced(t, [lambda o=output: dist.all_gather_into_tensor(o, t.of(t.rank, 2, 3)) for output in outputs])
    return [(output, torch.cat(_whole(t))) for output in outputs]


def coalescing_reduce_scatter(t):
    outputs = [t.blank(2, 3) for _ in range(2)]
    mine = t.of(t.rank, 2 * t.size, 3)
    _coalesced(t, [lambda o=output: dist.reduce_scatter_tensor(o, mine) for output in outputs])
    return [(output, _my_rows(t, "SUM")) for output in outputs]


# ---- functional collectives: always async, waited for at first use


def functional_moves(t):
    group, mine, rows = t.world.group, t.of(t.rank, 2 * t.size, 3), slice(2 * t.rank, 2 * t.rank + 2)
    everyone = [t.of(rank, 2 * t.size, 3) for rank in t.ranks]
    return [
        (functional.all_gather_tensor(mine, 0, group), torch.cat(everyone)),
        (functional.broadcast(mine, t.size - 1, group), everyone[-1]),
        (functional.all_to_all_single(mine, None, None, group), torch.cat([each[rows] for each in everyone])),
        *((got, torch.cat(everyone)) for got in functional.all_gather_into_tensor_coalesced([mine, mine], group)),
    ]


def functional_sums(t):
    group, mine = t.world.group, t.of(t.rank, 2 * t.size, 3)
    total = _reduced("SUM", [t.of(rank, 2 * t.size, 3) for rank in t.ranks])
    part = total[2 * t.rank : 2 * t.rank + 2]
    return [
        (functional.all_reduce(mine, "sum", group), total),
        (functional.reduce_scatter_tensor(mine, "sum", 0, group), part),
        *((got, total) for got in functional.all_reduce_coalesced([mine, mine], "sum", group)),
        *((got, part) for got in functional.reduce_scatter_tensor_coalesced([mine, mine], "sum", [0, 0], group)),
    ]


# ---- torch.distributed.nn: collectives with gradients


def differentiable_collectives(t):
    """Each call's result, and the gradient of this rank's input under weights that every rank chooses for itself."""
    group, root = t.world.group, t.size - 1
    weights = [t.of(rank, 3, salt=5) for rank in t.ranks]
    inputs = [t.of(rank, 3) for rank in t.ranks]
    total = _reduced("SUM", weights)
    pairs = []

    def tried(call, result, gradient):
        mine = inputs[t.rank].clone().requires_grad_()
        output = call(mine)
        output.backward(weights[t.rank].expand_as(output))
        pairs.extend([(output.detach(), result), (mine.grad, gradient)])

    zero = torch.zeros_like(total)
    tried(lambda x: differentiable.all_reduce(x, group=group), _reduced("SUM", inputs), total)
    tried(lambda x: differentiable.broadcast(x, root, group), inputs[root], total if t.rank == root else zero)
    tried(
        lambda x: differentiable.reduce(x, root, group=group),
        _reduced("SUM", inputs) if t.rank == root else inputs[t.rank],
        weights[root],
    )
    tried(lambda x: torch.stack(differentiable.all_gather(x, group)), torch.stack(inputs), total)
    tried(
        lambda x: torch.stack(differentiable.gather(x, root, group)),
        torch.stack(inputs) if t.rank == root else torch.stack([zero] * t.size),
        weights[root],
    )
    tried(lambda x: differentiable.scatter([x] * t.size, root, group), inputs[root], total if t.rank == root else zero)
    tried(
        lambda x: differentiable.reduce_scatter(torch.zeros_like(x), [x] * t.size, group=group),
        _reduced("SUM", inputs),
        total,
    )
    tried(
        lambda x: torch.stack(differentiable.all_to_all([torch.zeros_like(x) for _ in t.ranks], [x] * t.size, group)),
        torch.stack(inputs),
        total,
    )
    ones = [1] * t.size
    tried(
        lambda x: differentiable.all_to_all_single(t.blank(t.size, 3), x.expand(t.size, 3), ones, ones, group),
        torch.stack(inputs),
        total,
    )
    return pairs


def functional_gradients(t):
    group, rows = t.world.group, slice(2 * t.rank, 2 * t.rank + 2)
    inputs = [t.of(rank, 2 * t.size, 3) for rank in t.ranks]
    pairs = []
    for call, result, gradient in (
        (lambda x: functional.all_gather_tensor_autograd(x, 0, group), torch.cat(inputs), float(t.size)),
        (lambda x: functional.reduce_scatter_tensor_autograd(x, "sum", 0, group), _my_rows(t, "SUM"), 1.0),
        (
            lambda x: functional.all_to_all_single_autograd(x, [2] * t.size, [2] * t.size, group),
            torch.cat([each[rows] for each in inputs]),
            1.0,
        ),
    ):
        mine = inputs[t.rank].clone().requires_grad_()
        output = functional.wait_tensor(call(mine))
        output.backward(torch.ones_like(output))
        pairs += [(output.detach(), result), (mine.grad, torch.full_like(inputs[0], gradient))]
    return pairs


_SUM = _answer("SUM")
OPERATIONS_THAT_SUM = [
    *map(all_reduce, KINDS),
    *map(reduce, KINDS),
    *map(reduce_scatter, KINDS),
    Operation("reduce_scatter (uneven) SUM", reduce_scatter_uneven, answer=_SUM),
    *map(reduce_scatter_tensor, KINDS),
    *map(all_reduce_coalesced, KINDS),
    Operation("_coalescing_manager: all_reduce", coalescing_all_reduce, answer=_SUM),
    Operation("_coalescing_manager: all_gather_into_tensor", coalescing_all_gather),
    Operation("_coalescing_manager: reduce_scatter_tensor", coalescing_reduce_scatter, answer=_SUM),
    Operation("functional collectives that move", functional_moves, modes=(True,)),
    Operation("functional collectives that sum", functional_sums, modes=(True,), answer=_SUM),
    Operation("functional collectives with gradients", functional_gradients, dtypes=(*FLOATS, *COMPLEX), modes=(True,)),
    Operation(
        "torch.distributed.nn, with gradients", differentiable_collectives, dtypes=(*FLOATS, *COMPLEX), modes=(False,)
    ),
]

"""Silent corruption, found: ranks that hold the same numbers compare them, bit by bit, by a digest of each tensor.

A broken processor or memory gives wrong numbers and no error (Hochschild et al. 2021, "Cores that don't count"); the
weights of one replica then differ from those of the others for ever. What is compared are weights and the optimizer's
state: of the replicas of the data and context axes, of what the tensor axis does not cut, of weights that several
stages of a pipeline hold, and of the copy that the ranks of each host share. What one rank alone holds (a shard)
nobody can compare.
"""

import functools
import itertools

import torch

from .errors import Corrupted
from .parallel.sharding import local

_WORDS = 1 << 16  # a row, each of whose words has a factor: 512 KiB of them, which stay in a core's cache
_ROWS = 256  # of them at once on a GPU, where each call costs
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd
_ALL = 1 << 64


def check(comm, placed, optimizer, step, hosts):
    """Compare what ranks hold in common of `placed` (parallel.apply.Placed) and of its optimizer's state.

    Raises Corrupted, the same on every rank, where any two differ. step: that was just done; hosts: of each rank. One
    pass over weights and moments, and one message of a few bytes where nothing differs. Collective.
    """
    placed.ready()
    placed.reshard()
    mine, sums = digests(placed, optimizer), {}
    for (group, _), number in mine.items():
        sums[group] = (sums.get(group, 0) * _MULTIPLIER + number) % _ALL
    if differing(comm.allgather(sums)):
        found, told_apart = suspects(comm.allgather(mine))
        raise Corrupted(describe(found, told_apart, step, hosts), found).known_to_all()


def digests(placed, optimizer):
    """{(what the ranks that hold the same have in common, name): digest} of what this rank holds.

    name: of a parameter, or of a moment of it as in a checkpoint; in the order of the parameters.
    """
    place, found = placed.mesh.place, {}
    for name, parameter in placed.named_parameters():
        group = [("shard", place["shard"])]
        if name not in placed.shared:  # by several stages
            group.append(("pipeline", place["pipeline"]))
        if placed.pieces[name].dim is not None:  # of one copy for a host these are slices, and `shard` tells them apart
            group.append(("tensor", place["tensor"]))
        found[tuple(group), name] = digest(local(parameter.detach()))
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                found[tuple(group), f"{name}.{key}"] = digest(local(value))
    if placed.one_copy:
        number, common = placed.one_copy.my_part_of_all()
        for name, weights in common.items():
            found[("of a host", number), name] = digest(weights)
    return found


@torch.no_grad()
def digest(tensor):
    """A number of 64 bits for the bits of `tensor`, whatever its dtype.

    Its words of 64 bits, each times an odd number that belongs to its place, are added up modulo 2^64, row by row: one
    word that has changed always shows, since odd numbers have inverses; several hide with a chance of about 2^-64.
    """
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    if len(flat) % 8 or flat.storage_offset() % 8:  # a view as words wants neither
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    total = 0
    rows = _one_by_one if tensor.device.type == "cpu" else _many_at_once
    for number in rows(flat.view(torch.int64), _factors(tensor.device)):
        total = (total * _MULTIPLIER + number) % _ALL
    return total


def _one_by_one(words, factors):
    """The sum of each row of `words` (int64 [n]) times its `factors`."""
    return (int(torch.dot(row, factors[: len(row)])) for row in words.split(_WORDS))


def _many_at_once(words, factors):
    """The same where calls are dear."""
    if len(words) % _WORDS:
        words = torch.cat([words, words.new_zeros(-len(words) % _WORDS)])
    blocks = words.view(-1, _WORDS).split(_ROWS)
    return itertools.chain.from_iterable((rows * factors).sum(1).tolist() for rows in blocks)


@functools.cache
def _factors(device):
    made = torch.randint(-(1 << 62), 1 << 62, (_WORDS,), generator=torch.Generator().manual_seed(1))
    return (2 * made + 1).to(device)


def differing(everybody):
    """{key: {number: ranks that have it}} of keys under which ranks have different numbers.

    everybody: {key: number} of each rank.
    """
    found = {}
    for rank, known in enumerate(everybody):
        for key, number in known.items():
            found.setdefault(key, {}).setdefault(number, []).append(rank)
    return {key: by_number for key, by_number in found.items() if len(by_number) > 1}


def suspects(everybody):
    """({rank: name of the first tensor in which it has other bits than most}, True), from the `digests` of all.

    Where there are no most (of two replicas, say), all ranks that differ in anything, and False.
    """
    found = differing(everybody)
    odd = {key: _fewer(by_number) for key, by_number in found.items()}
    told_apart = any(odd.values())
    if not told_apart:
        odd = {key: list(itertools.chain(*by_number.values())) for key, by_number in found.items()}
    first = {}
    for rank, known in enumerate(everybody):
        names = [name for group, name in known if rank in odd.get((group, name), ())]
        if names:
            first[rank] = names[0]
    return first, told_apart


def _fewer(by_number):
    """The ranks that do not have what most have; none where no number has more ranks than every other."""
    most, second, *_ = sorted(map(len, by_number.values()), reverse=True)
    return [rank for ranks in by_number.values() if len(ranks) < most for rank in ranks] if most > second else []


def describe(found, told_apart, step, hosts):
    """The sentence for what `suspects` has found."""
    where = [f"rank {rank} ({hosts[rank]}) first in {name}" for rank, name in found.items()]
    listed = "; ".join(where[:8]) + (f"; and {len(where) - 8} more" if len(where) > 8 else "")
    if told_apart:
        return (
            f"step {step}: corrupted, by a faulty processor or memory: not the bits that most ranks have has {listed}"
        )
    return (
        f"step {step}: corrupted, by a faulty processor or memory: ranks that hold the same have different bits, and "
        f"which of them are right nothing tells: {listed}"
    )

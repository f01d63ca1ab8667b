"""Whom a rank waits for, and the report that says so. Plain functions of what was read; communicates nothing."""

from dataclasses import dataclass

from .progress import spell

# Up to so many ranks, the report has the history and the stacks of all of them; beyond, of these kinds at most.
_ALL, _NAMED, _OTHERS = 32, 16, 8


@dataclass(frozen=True)
class Verdict:
    """named: the ranks everything waits for, ascending; sentence: who they are and what is known of them."""

    named: tuple[int, ...]
    sentence: str


def members(states, key, size):
    """World ranks of the group `key`, from any rank that knows them; without one, all ranks."""
    for state in states.values():
        group = state.groups.get(key)
        if group and group.ranks:
            return group.ranks
    return tuple(range(size))


def waits_for(states, rank, operation, size):
    """Ranks that have yet to do something before `operation` of `rank` can end, as far as can be seen."""
    ranks = members(states, operation.group, size)
    if operation.peer is not None:
        return {operation.peer} if operation.peer >= 0 else set(ranks) - {rank}
    missing = set()
    for other in ranks:
        state = states.get(other)
        group = state.groups.get(operation.group) if state else None
        entered, left = (group.entered, group.left) if group else (0, 0)
        halted = state is None or state.process in ("stopped", "gone")
        if other != rank and (entered < operation.sequence or (halted and left < operation.sequence)):
            missing.add(other)
    return missing


def _blocked(state):
    """True for a rank that cannot be blamed by itself, since it waits for others."""
    return state is not None and state.process in ("runs", "unknown") and not state.leaving and bool(state.open)


def judge(states, rank, operation, size, silent_s=5.0):
    """The `Verdict` on `operation`, in which `rank` waits.

    states: world rank -> `progress.State`, of all ranks that could be read. Follows who waits for whom to those who
    wait for nobody. silent_s: seconds after which a watchdog that has not run says that nothing in its process can.
    """
    waits, ends, front = {rank: waits_for(states, rank, operation, size)}, set(), {rank}
    while front:
        new = set().union(*(waits[r] for r in front)) - waits.keys() - ends
        ends |= {r for r in new if not _blocked(states.get(r))}
        front = new - ends
        for r in front:
            waits[r] = set().union(*(waits_for(states, r, call, size) for call in states[r].open))
    if ends:
        told = (f"rank {r} {_where(states.get(r))}{_condition(states.get(r), silent_s)}" for r in sorted(ends)[:8])
        return Verdict(tuple(sorted(ends)), _naming(sorted(ends), told))
    if waits[rank]:
        circle = set(waits)
        while not circle <= (needed := set().union(*(waits[r] for r in circle))):
            circle &= needed  # those that nobody waits for are not in it
        told = (
            f"rank {r} {_where(states[r])}waits itself in {called(states[r], (states[r].open or [operation])[-1])}"
            for r in sorted(circle)[:8]
        )
        return Verdict(tuple(sorted(circle)), _naming(sorted(circle), told) + "; a circle")
    calls = {}
    for other in members(states, operation.group, size):
        for call in states[other].operations if other in states else ():
            if (call.group, call.sequence) == (operation.group, operation.sequence):
                calls.setdefault(call.what, []).append(other)
    if len(calls) > 1:
        fewest = min(len(ranks) for ranks in calls.values())
        named = tuple(sorted(r for ranks in calls.values() if len(ranks) == fewest for r in ranks))
        told = ", ".join(f"{what} on rank{'s' if len(r) > 1 else ''} {spell(sorted(r))}" for what, r in calls.items())
        return Verdict(named, f"is not the same call on all ranks: {told} (HPCLLM_CHECK=1 names the lines of code)")
    return Verdict((), "has been entered by all its ranks: what does not end is MPI itself, or the network")


def _ago(state, time_ns):
    return f"{(state.now - time_ns) / 1e9:.1f} s"


def _where(state):
    return f"on {state.host} (pid {state.pid}) " if state else ""


def _condition(state, silent_s):
    if state is None:
        return "could not be read: no watchdog of its host answers"
    if state.process == "gone":
        return "is gone"
    if state.process == "stopped":
        return "is stopped (SIGSTOP)"
    if state.leaving:
        return "has come to the end of its program"
    if state.now - state.beat > silent_s * 1e9:
        condition = "does not answer (a thread of it holds Python's lock)"
    else:
        condition = "is not in a collective"
    if not state.operations:
        return f"{condition} and has not communicated so far"
    last = state.operations[-1]
    return f"{condition}, {_ago(state, last.end)} after {called(state, last)}" if last.end else condition


def called(state, operation):
    """An operation in words, as the rank of `state` calls its group."""
    group = state.groups.get(operation.group)
    number = f" #{operation.sequence}" if operation.sequence else ""
    peer = "" if operation.peer is None else f" with {'any rank' if operation.peer < 0 else f'rank {operation.peer}'}"
    return f"{operation.what}{number}{peer} of group {group.name if group else '?'}"


def _naming(ranks, told):
    """Whom an operation waits for; told: what is known of the first eight of them."""
    more = f"; and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"waits for rank{'s' if len(ranks) > 1 else ''} {spell(ranks)}: {'; '.join(told)}{more}"


def text(states, rank, operation, size, verdict, code, silent_s=5.0):
    """The whole report, for stderr; states as in `judge`, with the stacks that could be had."""
    me = states[rank]
    lines = [
        f"hpcllm: {called(me, operation)} has not ended in {_ago(me, operation.start)} on rank {rank} of {size} "
        f"({me.host}): it {verdict.sentence}. All ranks are being ended with exit code {code}."
    ]
    shown = sorted(states)
    if size > _ALL:
        shown = [r for r in verdict.named if r in states][:_NAMED]
        shown += [r for r in sorted(states) if r not in shown and (r == rank or len(shown) < _NAMED + _OTHERS)]
    lines.append("where the ranks are:")
    for other in shown:
        state = states[other]
        doing = "".join(f"; for {_ago(state, call.start)} in {called(state, call)}" for call in state.open)
        if not state.open or state.process != "runs":
            doing = f" {_condition(state, silent_s)}{doing}"
        lines.append(f"  rank {other} on {state.host}, pid {state.pid},{doing.removeprefix(';')}")
    missing = sorted(set(range(size)) - set(states))
    if missing:
        lines.append(f"  rank{'s' if len(missing) > 1 else ''} {spell(missing)}: unknown")
    for other in shown:
        lines += _history(states[other])
        stacks = states[other].stacks.strip("\n")
        lines.append(f"stacks of rank {other}:" + ("" if stacks else " none, it did not answer"))
        lines += [f"  {line}" for line in stacks.splitlines()]
    return "\n".join(lines) + "\n"


def _history(state):
    yield f"last {len(state.operations)} operations of rank {state.rank}, newest last:"
    for call in state.operations:
        took = f"took {(call.end - call.start) / 1e6:.3f} ms" if call.end else "not ended"
        yield f"  {_ago(state, call.start)} ago: {called(state, call)}, {took}"

"""The watchdog: a thread per process that notices when communication does not end, says why, and ends the job.

A rank whose operation has waited longer than its group's timeout looks up what the other ranks are doing: those of
its host in the memory that `progress` keeps, those of other hosts by asking their watchdogs over MPI. One rank prints
one report (`report`) that names the ranks that everything waits for, and the job ends with exit code 124. Only time
spent in an operation counts: a rank may compute for as long as it likes as long as no other one waits for it. A rank
of the same host that has died without a word is named as soon as the kernel says so.

    HPCLLM_TIMEOUT_S    seconds an operation may wait (600; 0: no watchdog). A timeout given to torch's
                        `new_group(timeout=...)` holds for that group instead.

Time during which the whole process was suspended (a debugger, a scheduler that puts jobs to sleep) does not count.
"""

import atexit
import contextlib
import datetime
import faulthandler
import os
import select
import signal
import sys
import threading
import time

from ..errors import UsageError
from . import abort, launcher, progress, report, speak

TIMEOUT_CODE = 124  # as timeout(1) does
DEFAULT_S = 600.0
# The watchdog wakes ten times in a timeout, but at least and at most so often (s).
_SHORTEST_S, _LONGEST_S = 0.05, 5.0
# At this signal, which nothing else uses, a process writes down the stacks of its threads whatever it is doing.
_DUMP_SIGNAL = signal.SIGRTMIN + 7
_DUMPED_S = 1.0
# Each rank watches whether the next so many of its host live: with that the death of one is seen by several.
_NEIGHBOURS = 8
# A launcher that sees a rank die ends the job itself and knows the exit code better.
_LAUNCHER_S = 3.0
# Ranks of every other host that are asked; the first answer counts for its host.
_ASKED_A_HOST = 4
_ASK, _ANSWER = 1, 2
_YIELD_S = 60.0


class _State:
    watchdog = None


def timeout_s(environ=os.environ):
    """Seconds that HPCLLM_TIMEOUT_S grants an operation; 0 for no watchdog. Raises UsageError."""
    text = environ.get("HPCLLM_TIMEOUT_S", "").strip() or str(DEFAULT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"HPCLLM_TIMEOUT_S={text}: seconds are wanted (0: no watchdog)").known_to_all()
    return seconds


def start(world, local=None):
    """Start this process's watchdog; further calls do nothing. Collective over the ranks of `world`.

    local: communicator of the ranks that share memory; found out by default.
    """
    if not timeout_s() or world.size == 1 or _State.watchdog is not None:
        return
    from mpi4py import MPI

    own = local is None
    local = world.comm.Split_type(MPI.COMM_TYPE_SHARED) if own else local
    memory = progress.share(local)
    first = local.bcast(world.rank)
    hosts = {}
    for rank, leader in enumerate(world.comm.allgather(first)):
        hosts.setdefault(leader, []).append(rank)
    if own:
        local.Free()
    others = [ranks for leader, ranks in hosts.items() if leader != first]
    talk = world.comm.Dup() if others and MPI.Query_thread() == MPI.THREAD_MULTIPLE else None
    watchdog = Watchdog(world, memory, others, talk)
    world.comm.Barrier()  # every slot is filled in
    _State.watchdog = watchdog
    watchdog.start()
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
            faulthandler.enable()  # a segmentation fault shows the lines of Python that led to it
    atexit.register(stop)  # called before MPI is finalised, since `abort` has registered that earlier


def stop():
    """End the thread: this process is at the end of its program."""
    if _State.watchdog is not None and _State.watchdog.process == os.getpid():
        _State.watchdog.stop()


def forget():
    """End the thread, so that `start` begins another one, for other ranks."""
    if _State.watchdog is not None:
        _State.watchdog.stop()
        _State.watchdog = None


def place(name, ranks, timeout):
    """The `progress.Place` for a new group, or None without a watchdog.

    ranks: world ranks of its members. timeout: a timedelta, or None for the setting's.
    """
    if _State.watchdog is None:
        return None
    seconds = timeout_s() if timeout is None else timeout / datetime.timedelta(seconds=1)
    return _State.watchdog.place(name, tuple(ranks), seconds)


@contextlib.contextmanager
def waiting(what):
    """Within it this rank waits for all others, for no more than HPCLLM_TIMEOUT_S, in what torch knows nothing of."""
    place = _State.watchdog and _State.watchdog.everybody
    if place is None:
        yield
        return
    number = place.log.enter(place, what, (), time.monotonic_ns())
    try:
        yield
    finally:
        place.log.leave(number, time.monotonic_ns())


class Watchdog:
    """memory: the host's `progress.Memory`; others: world ranks of each other host; talk: communicator, or None."""

    def __init__(self, world, memory, others, talk):
        self.process = os.getpid()
        self.log = progress.Log(memory, world.rank)
        self._world, self._memory, self._others, self._talk = world, memory, others, talk
        self._interval_s = _LONGEST_S
        self._waited = {}  # number of an operation -> seconds
        self._soonest_s = float("inf")  # until an operation that is under way is late
        self._answers = []
        self._claimed, self._quiet_until = False, 0.0
        self._gone = set()
        self._stopped = False
        self._poll = select.poll()
        self._wake, self._woken = os.pipe()
        self._poll.register(self._wake, select.POLLIN)
        self._peers = {}
        self.everybody = self.place("all ranks", tuple(range(world.size)), timeout_s())
        self._thread = threading.Thread(target=self._run, name="hpcllm watchdog", daemon=True)

    def start(self):
        self._dump_on_signal()
        self._thread.start()

    def stop(self):
        self.log.leave_job()
        self._stopped = True
        self._nudge()
        self._thread.join(5)

    def place(self, name, ranks, seconds):
        made = self.log.place(name, ranks, seconds)
        interval = min(max(seconds / 10, _SHORTEST_S), _LONGEST_S)
        if interval < self._interval_s:
            self._interval_s = interval
            self._nudge()
        return made

    def _nudge(self):
        with contextlib.suppress(OSError):
            os.write(self._woken, b"x")

    def _dump_on_signal(self):
        if self._memory.descriptor is None or signal.getsignal(_DUMP_SIGNAL) != signal.SIG_DFL:
            return
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            # Opened anew: every rank writes at a place of its own in the file.
            file = os.open(f"/proc/self/fd/{self._memory.descriptor}", os.O_RDWR)
            os.lseek(file, self._memory.stacks_offset(self._memory.mine), os.SEEK_SET)
            faulthandler.register(_DUMP_SIGNAL, file=file, all_threads=True)
            self.log.answers_to(int(_DUMP_SIGNAL))

    # ---- the thread

    def _run(self):
        self._watch_neighbours()
        last = time.monotonic()
        while not self._stopped:
            self.log.beat()
            pause = min(self._interval_s, 0.1 if self._gone else self._soonest_s + 0.01)
            events = self._poll.poll(1000 * pause)
            now = time.monotonic()
            # Where far more time has gone by, this process was suspended and has not waited.
            gap, last = min(now - last, 2 * self._interval_s + 0.1), now
            for file, _ in events:
                if file == self._wake:
                    os.read(self._wake, 4096)
                else:
                    self._poll.unregister(file)
                    os.close(file)
                    self._gone.add(self._peers.pop(file))
            self._converse(self._answer)
            if self._gone:
                self._lost()
            number = self._late(gap)
            if number is not None:
                self._speak(number)

    def _watch_neighbours(self):
        slots = len(self._memory.readable)
        for step in range(1, min(_NEIGHBOURS, slots - 1) + 1):
            slot = (self._memory.mine + step) % slots
            with contextlib.suppress(OSError, AttributeError):
                pid, state = self._memory.process(slot)
                if state == "gone":
                    self._gone.add(slot)
                elif state != "unknown":
                    file = os.pidfd_open(pid)
                    self._peers[file] = slot
                    self._poll.register(file, select.POLLIN)

    def _late(self, gap):
        """Count the time of all operations under way; the number of one that has waited too long, or None."""
        waited, now = {}, time.monotonic_ns()
        late, self._soonest_s = None, float("inf")
        for number, (place, _, start, *_) in list(self.log.open.items()):
            waited[number] = min((now - start) / 1e9, self._waited.get(number, 0.0) + gap)
            if waited[number] <= place.timeout_s:
                self._soonest_s = min(self._soonest_s, place.timeout_s - waited[number])
            elif place.timeout_s > 0 and late is None:
                late = number
        self._waited = waited
        return late

    # ---- a rank of this host is gone

    def _lost(self):
        self._gone = {slot for slot in self._gone if not self._memory.leaving(slot) and not abort.survives()}
        if not self._gone or not self.log.open or self._memory.leaving(self._memory.mine):
            return
        dead = [slot for slot in self._memory.readable if self._memory.process(slot)[1] == "gone"]
        if len(dead) > 1:
            time.sleep(0.2)  # this is the launcher ending the job, and it is about to end this rank too
        number = next(iter(self.log.open), None)
        operation = None if number is None else self.log.operation(number)
        if operation is None:
            return
        if speak.first_of_host():
            name, size, host = self._world.rank, self._world.size, self._world.host
            told = "; ".join(
                f"rank {self._memory.rank(slot)} of {size} on {host} (pid {self._memory.process(slot)[0]}) is gone"
                for slot in sorted(self._gone)
            )
            where = report.called(self._memory.read(self._memory.mine, host), operation)
            speak.write(f"hpcllm: {told} without a word, while rank {name} waits in {where}\n")
        deadline = time.monotonic() + _LAUNCHER_S
        while number in self.log.open:
            if time.monotonic() > deadline:
                abort.end_all(abort.KILLED_CODE if launcher.fault_tolerant() else 1)
            time.sleep(0.05)
        self._gone = set()

    # ---- an operation is late

    def _speak(self, number):
        """Print the report and end the job, unless another rank does."""
        operation = self.log.operation(number)
        if operation is None or time.monotonic() < self._quiet_until:
            return
        if not self._claimed and not speak.first_of_host():
            # The first one has the word; should it come to nothing, this rank takes it.
            self._quiet_until, self._claimed = time.monotonic() + _YIELD_S, True
            return
        self._claimed = True
        silent_s = max(3 * self._interval_s, 1.0)
        here, elsewhere = self._host(), self._converse(self._ask)
        if elsewhere is None:
            self._quiet_until = time.monotonic() + _YIELD_S
            return
        states = elsewhere | here
        rank, size = self._world.rank, self._world.size
        verdict = report.judge(states, rank, operation, size, silent_s)
        speak.write(report.text(states, rank, operation, size, verdict, TIMEOUT_CODE, silent_s))
        abort.end_all(TIMEOUT_CODE)

    def _host(self):
        """World rank -> `progress.State` of the ranks of this host."""
        slots = self._memory.readable
        states = [self._memory.read(slot, self._world.host) for slot in slots]
        # Afterwards: the signal also ends a sleep or a read in C, and with that perhaps what is to be seen.
        stacks = self._stacks()
        for slot, state in zip(slots, states, strict=True):
            state.stacks = stacks[slot]
        return {state.rank: state for state in states}

    def _stacks(self):
        """Slot -> what its process wrote about its threads. Stopped and dead ones write nothing."""
        before, asked = {}, []
        for slot in self._memory.readable:
            before[slot] = self._memory.stacks(slot)
            pid, state = self._memory.process(slot)
            if state == "runs" and self._memory.signal(slot):
                with contextlib.suppress(OSError):
                    os.kill(pid, self._memory.signal(slot))
                    asked.append(slot)
        deadline, texts = time.monotonic() + _DUMPED_S, dict(before)
        while time.monotonic() < deadline:
            time.sleep(0.1)
            now = {slot: self._memory.stacks(slot) for slot in before}
            settled = now == texts and all(len(now[slot]) > len(before[slot]) for slot in asked)
            texts = now
            if settled:
                break
        if self._memory.descriptor is None:
            texts[self._memory.mine] = _own_stacks()
        return texts

    # ---- other hosts

    def _converse(self, say):
        """`say()`; a death that MPI survives breaks this watchdog's talk with other hosts, but not the job."""
        from mpi4py import MPI

        try:
            return say()
        except MPI.Exception:
            if not abort.survives():
                raise
            self._talk = None
            return {}

    def _answer(self):
        """Tell the ranks of other hosts that have asked what the ranks of this one are doing."""
        if self._talk is None:
            return
        from mpi4py import MPI

        self._answers = [request for request in self._answers if not request.Test()]
        status = MPI.Status()
        states = None
        while self._talk.Iprobe(MPI.ANY_SOURCE, _ASK, status):
            asking = status.Get_source()
            self._talk.recv(source=asking, tag=_ASK)
            self.log.asked_by(asking)
            states = states or self._host()
            self._answers.append(self._talk.isend(states, dest=asking, tag=_ANSWER))

    def _ask(self):
        """States of the ranks of other hosts, as far as these answer; None where a lower rank is asking as well."""
        states = {}
        if self._talk is None:
            return states
        from mpi4py import MPI

        for ranks in self._others:
            for rank in ranks[:_ASKED_A_HOST]:
                self._answers.append(self._talk.isend(None, dest=rank, tag=_ASK))
        expected = {rank for ranks in self._others for rank in ranks}
        status = MPI.Status()
        # A watchdog that sleeps hears of it when it wakes; those of this host answer others meanwhile, as this one.
        deadline = time.monotonic() + 2 * self._interval_s + 2 * _DUMPED_S + 1
        while time.monotonic() < deadline and not expected <= states.keys():
            self._answer()
            asking = self._memory.asked()
            if asking is not None and asking < self._world.rank:
                return None
            while self._talk.Iprobe(MPI.ANY_SOURCE, _ANSWER, status):
                states.update(self._talk.recv(source=status.Get_source(), tag=_ANSWER))
            time.sleep(0.02)
        return states


def _own_stacks():
    """The Python stacks of this process, by itself."""
    import traceback

    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(thread, thread)}:\n" + "".join(traceback.format_stack(frame))
        for thread, frame in sys._current_frames().items()
    )

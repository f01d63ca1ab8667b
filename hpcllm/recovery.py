"""A run goes on when ranks die: those that are left discard the unfinished step, and share its global batch out anew.

Each optimizer step is committed: it changes anything only after all ranks have agreed that their part of it has
succeeded (`mpi.survive`). So the ranks that are left hold the weights and moments of the same step. Where each holds
the whole model, they go on from memory; where ranks divide weights or moments between them, by way of a checkpoint: one
of that step, if those that are left hold all of it between them (copies of shards, or of what the tensor axis cuts),
else the newest there is. The order of samples knows no ranks.

Spares (`resilience.spares`) are the last processes of the job. Of those that live the first ones, as many as the run
had ranks to begin with, are its ranks, whatever has happened: so a spare comes in when a rank dies. It is told by root
what it has missed, and gets weights and optimizer from its memory, or as all from a checkpoint.
"""

import contextlib
import copy
import itertools
import time
import traceback

import torch

from . import best, checkpoint, deadline, files, monitor, optimizer, run_folder, saving, sources, stopping
from .errors import CannotCreate, DataError, TooFewRanks, UsageError
from .mpi import alone, launcher, on_root, regroup, remain, survive, together, watch
from .parallel import host
from .parallel import mesh as meshes
from .spikes import Spikes


def wanted(config, world):
    """Whether the run outlives ranks, as [resilience] of the run file and the job will have it. Collective.

    Raises UsageError, the same on every rank, where it must (shrink = true) and cannot.
    """
    if config.resilience.shrink is False:
        return False
    why = _refusal(config, world)
    if why and config.resilience.shrink is True:
        raise UsageError(f"resilience: shrink = true {why}").known_to_all()
    if why and launcher.fault_tolerant() and world.is_root:
        print(f"a rank that dies will end this job: to survive it {why}", flush=True)
    return why is None


def check_spares(config, world):
    """Raise UsageError, the same on every rank, where the last ranks of `world` cannot be the spares that are wanted.

    Collective.
    """
    spares = config.resilience.spares
    if not spares:
        return
    if spares >= world.size:
        ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
        raise UsageError(f"resilience: spares = {spares} of {ranks} leaves none that trains").known_to_all()
    if why := _refusal(config, world):
        raise UsageError(f"resilience: spares = {spares} {why}").known_to_all()


def _refusal(config, world):
    """Why a run cannot outlive ranks of `world`, None where it can. Collective."""
    why = survive.refusal(world)
    if config.parallel.backend != "mpi":
        return f'needs parallel.backend = "mpi", not "{config.parallel.backend}"'
    if config.data.reader == "mpio":
        return 'needs data.reader = "mapped": collective reads end with a rank that dies'
    return why


# A file system may take so long to notice that the process which held a lock is gone.
_UNLOCKED_S = 1.0


class Survival:
    """What makes `run` (train.Run, its folder open; of a spare, one that has nothing yet) outlive ranks.

    committed: the step up to which all ranks have agreed; at_step: the weights in memory are that step's; deaths: how
    often ranks have died.
    """

    def __init__(self, run):
        world = run.world
        self._run, self._comm = run, None if world.waits else world.comm
        # All that live, the spares last, of whom the first `_size` are the ranks of the run.
        self._job, self._size = world.job or world.comm, world.size - run.config.resilience.spares * world.waits
        self._new, self._armed = world.waits, False  # new: a spare, as long as others know more than it does
        hosts = world.job_hosts or self._comm.allgather(world.host)
        self._members = list(enumerate(hosts))  # of the job as it began, by whose numbers users know its ranks
        self.committed, self.at_step, self.deaths = run.state["step"], not world.waits, 0
        if not self._new:
            self._hosts, self._parallel = list(hosts[: world.size]), run.placed.parallel
            self._peak_of_one = run.peak / world.size
            others = "a spare takes its place" if world.spares else "the others go on"
            run.progress.say(f"a rank that dies does not end this job: {others}")

    def commit(self):
        """All ranks' part of the step under way has succeeded, or PeersDied is raised on all. Collective."""
        self.agree()
        self.committed = self._run.state["step"] + 1
        if not self._armed:
            survive.arm()
            self._armed = True

    def agree(self):
        """As `commit`, of something that is no step: what it has come to may decide what follows. Collective."""
        with watch.waiting("agreement"):
            survive.commit(self._comm, self._job is self._comm or survive.whole(self._job))

    @contextlib.contextmanager
    def changing(self):
        """Around what puts other weights in the place of those of the step committed last. Collective."""
        self.at_step = False
        yield
        self.agree()
        self.committed, self.at_step = self._run.state["step"], True

    def go(self, parts):
        """As Run.go. A death before the first step has been committed ends the job."""
        while True:
            try:
                results = self._too_few() or self._run.steps(parts)
                self.agree()
                return results
            except Exception as error:
                agreed = self._agreed(error)
            parts = None
            self._recover(agreed)

    def stand_by(self):
        """What a spare does: nothing, until it is needed, and then as `go`. Leaves with the others where these end."""
        survive.arm()
        self._armed = True
        while self._new:
            survive.wait(self._job, self._size)
            self._recover(agreed=True)
        return self.go(None)

    def _too_few(self):
        """The results of a run that ends since it has lost too many ranks, None where it has not."""
        least, left = self._run.config.resilience.min_ranks, self._run.world.size
        if not self.deaths or left >= least:
            return None
        return self._run.stop(stopping.Wish(f"{left} of its ranks live, resilience.min_ranks is {least}"))

    def _agreed(self, error):
        """Of a death, whether all ranks have been told of it already; any other `error` is raised."""
        died = survive.died(self._job, error) if self._armed else None
        if died is None:
            raise error
        traceback.clear_frames(error.__traceback__)  # which hold on to the model as it was
        return died.agreed

    def _recover(self, agreed):
        """Go on without those that have died, and without those that die meanwhile. A spare may stay one."""
        run, began, before, members, size = self._run, time.monotonic(), self._job, self._members, self._run.world.size
        step, unfinished = self.committed + 1, run.saver and run.saver.abandon()
        while True:
            with watch.waiting("meeting"):
                self._job = survive.shrink(self._comm, agreed, self._job)
            try:
                comm = survive.first(self._job, self._size)
                if comm is None:
                    remain(self._job)
                    return
                self._comm = comm
                gone = survive.missing(before, self._job)
                if not self._new:
                    self._members = [member for rank, member in enumerate(members) if rank not in gone]
                self._rebuild(unfinished)
                survive.commit(self._comm)
                break
            except Exception as error:
                agreed = self._agreed(error)
        self.deaths, self._new = self.deaths + 1, False
        seconds, left = round(time.monotonic() - began, 3), run.world.size
        if not run.world.is_root:
            return
        dead, where = zip(*(members[rank] for rank in gone), strict=True)
        told = {"step": step, "ranks": dead, "hosts": where, "left": left, "seconds": seconds}
        joined = self._members[size - sum(rank < size for rank in gone) : left]
        if run.config.resilience.spares:
            told |= {"joined": [number for number, _ in joined], "spares": run.world.spares}
        run.journal.event("died", **told, goes_on_from=self.committed)
        run.progress.say(sentence(dead, where, step, left, seconds, self.committed, joined))

    def _rebuild(self, unfinished):
        """All that knows the ranks, made anew for those that are left. Collective over these."""
        run, comm, folder = self._run, self._comm, self._run.config.run.output_dir
        run.world = world = regroup(comm, self._job)
        self._hosts = comm.allgather(world.host)
        newest = on_root(comm, _tidy, folder)
        known = comm.allgather(None if self._new else (self.committed, self.at_step))
        joining, steps = None in known, {one for one in known if one}
        if not steps:
            raise TooFewRanks(
                f"all ranks of the run have died, and its spares have not been told enough to go on; the newest "
                f"checkpoint is {newest or 'none'}, from which the same command with --resume goes on"
            ).known_to_all()
        way = self._way(steps)
        if joining:
            self._take_in()
            way = comm.bcast(way)
        if way != "back":
            self._agree_where()
            self._agree_on_best(folder)
        if way == "on":
            self._go_on(self._layout(newest), joining)
        else:
            if way == "salvage":
                newest = self._salvage(joining) or newest
            newest = self._go_back(self._layout(newest))
        run.clock = monitor.Clock(world.group, run.placed.mesh.losses)
        run.journal = monitor.Journal(folder, run.state["restart"], world.is_root)
        run.requests.look(world.is_root)
        if world.is_root and run.progress.quiet:
            run.progress = monitor.Progress("train", run.plan.max_steps, run.state["step"])
        run.saver = run.new_saver(newest)
        run.owes = comm.bcast(run.owes or (unfinished is not None and unfinished != newest))
        # What ranks decide by, each for itself, must be the same on all of them.
        run.interval, run.spikes = comm.bcast((run.interval, run.spikes))
        run.back = run.checked = None
        run.watch_ranks()

    def _way(self, steps):
        """How to go on: "on" from memory, by way of what can be saved of it ("salvage"), or "back" to a checkpoint.

        steps: what ranks say of `committed` and `at_step`.
        """
        placed = self._run.placed
        # Nobody has taken a step that others have not, or `commit` is broken.
        if len(steps) > 1 or not self.at_step or placed is None:
            return "back"
        if not placed.divided:
            return "on"
        can = placed.mesh.layout.pipeline == 1 and not placed.one_copy and self.committed
        return "salvage" if can else "back"

    def _take_in(self):
        """Tell the spares among the ranks, by root, what they have missed, and have them open the data. Collective."""
        run, world, comm = self._run, self._run.world, self._comm
        letter = None
        if not self._new:
            letter = {"config": run.config, "parallel": self._parallel, "committed": self.committed, "state": run.state}
            letter |= {"members": self._members, "deaths": self.deaths, "peak": (self._peak_of_one, run.measured)}
            letter |= {"again": (run.again, run.why), "longest": run.requests.longest, "scores": run.scores}
            letter |= {"threads": torch.get_num_threads(), "digest": run.sources.training.stream.digest}
        letter = comm.bcast(letter)
        with together(comm):
            if self._new:
                self._read(letter)
                run.sources = run.sources or sources.open_all(run.config, alone(world))
                if run.sources.training.stream.digest != letter["digest"]:
                    raise DataError(f"data: {run.config.data.train} is not what it was when the run began")

    def _read(self, letter):
        """Make of a spare's `run` what others know of it. See `_take_in`."""
        run = self._run
        run.config, run.plan, run.state = letter["config"], letter["config"].train, letter["state"]
        (self._peak_of_one, run.measured), (run.again, run.why) = letter["peak"], letter["again"]
        self._parallel, self._members, self.deaths = letter["parallel"], letter["members"], letter["deaths"]
        self.committed, run.scores = letter["committed"], letter["scores"]
        torch.set_num_threads(letter["threads"])  # sums of as many parts, bit for bit
        limit = run.config.run.time_limit and deadline.seconds(run.config.run.time_limit)
        run.requests = stopping.Requests(run.config.run.output_dir, False, limit)
        run.requests.longest |= letter["longest"]
        run.progress = monitor.Progress("train", run.plan.max_steps, run.state["step"], quiet=True)

    def _layout(self, newest):
        """The mesh.Layout of the ranks that are left. Raises TooFewRanks where they cannot hold the model."""
        plan, parallel = self._run.plan, self._parallel
        try:
            layout = meshes.layout(parallel, self._hosts)
            if layout.shard > 1:
                plan.accumulation(layout.data)  # forward is a collective call, of which each rank makes as many
            why = host.refusal(parallel, self._run.world) if parallel.sharding == "host" else None
            if why:
                raise UsageError(f'parallel: sharding = "host" {why}')
        except UsageError as error:
            raise TooFewRanks(
                f"ranks have died, and the other {len(self._hosts)} cannot go on ({error}); the newest checkpoint is "
                f"{newest or 'none'}, from which the same command with --resume goes on"
            ).known_to_all() from None
        return layout

    def _agree_where(self):
        """Make of `state` that of the step committed last, on all ranks."""
        run, comm, state = self._run, self._comm, self._run.state
        state["samples"] += (self.committed - state["step"]) * run.plan.global_batch_size
        # What was due after that step is done again, unless all of it was done.
        state |= {"step": self.committed, "best": copy.deepcopy(run.best)}
        told = dict(comm.bcast(state))  # as a whole: some ranks may have been a line further than others
        state.clear()
        state.update(told)
        self.at_step = True
        run.settled, run.best, run.scores = comm.bcast((run.settled, run.best, run.scores))

    def _agree_on_best(self, folder):
        """The best checkpoint may be the one that was being written, and be gone with that."""
        state = self._run.state
        state["best"] = on_root(self._comm, run_folder.best_there_is, folder, state.get("best"))
        self._run.best = copy.deepcopy(state["best"])

    def _go_on(self, layout, joining):
        """From memory: each rank has the weights and the optimizer of the step committed last, or is given them."""
        run, comm = self._run, self._comm
        if joining:
            with together(comm):
                if self._new:
                    net, weights = run.load(None)
                    run.prepare(net)
        if self._new:
            run.take_part(net, weights, self._parallel, layout)  # root's weights are everybody's (parallel.data)
        else:
            run.placed = run.placed.moved(meshes.build(layout, run.world))
        if joining:
            optimizer.share(run.adjust, comm, run.world.group)
        run.peak = self._peak_of_one * run.world.size

    def _salvage(self, joining):
        """The path of a checkpoint of the step committed last, where these ranks hold all of it between them.

        joining: spares are among them, who have nothing of it.
        """
        comm = self._comm
        if not joining:
            return self._save_what_is_left(comm)
        knowing, path = comm.Split(self._new, comm.rank), None
        with together(comm):
            if not self._new:
                path = self._save_what_is_left(knowing)
        return comm.bcast(path)

    def _save_what_is_left(self, comm):
        run = self._run
        kept = run.kept() | {"unmeasured": run.owes_scores}
        folder, tokenizer_dir = run.config.run.output_dir, run.config.data.tokenizer_dir
        return saving.salvage(comm, folder, self.committed, run.placed, run.adjust, tokenizer_dir, kept)

    def _go_back(self, layout):
        """From the newest checkpoint, which is returned, or the start: what the dead had is nowhere else."""
        run, state = self._run, {"step": 0, "samples": 0, "useful_s": 0.0, "nonfinite": 0}
        self.at_step = False  # a death in here finds ranks at different lines, and all are to come here again
        run.placed = run.adjust = None
        run.scores, run.told = {}, None
        newest = on_root(self._comm, run_folder.newest_good, run.config.run.output_dir)
        if newest:
            state |= on_root(self._comm, checkpoint.read_state, newest)
            state["best"] = on_root(self._comm, run_folder.best_there_is, newest.parent, state.get("best"))
            keeping = newest.parent, run.config.checkpoint.keep, best.step(state)
            on_root(self._comm, checkpoint.delete_older, *keeping)
        restart = run.state["restart"]
        run.state.clear()
        run.state.update(state, restart=restart)
        run.place(self._parallel, layout, newest)
        self.committed, self.at_step = state["step"], True
        run.spikes = Spikes(run.plan, state.get("spikes"))
        run.settle()
        return newest


def _tidy(folder):
    """Path of the newest checkpoint in `folder` or None; what was not completed is removed. Root only."""
    with files.failing_as_io(folder):
        checkpoint.rescue(folder)
        with contextlib.suppress(CannotCreate):  # of a root whose death the file system does not know yet: `Run.saved`
            run_folder.lock(folder, _UNLOCKED_S)
            checkpoint.remove_unfinished(folder)
        checkpoint.point(folder)
        return checkpoint.newest(folder)


def sentence(dead, hosts, step, left, seconds, committed, joined=()):
    """Who has died, and how it goes on.

    dead: ranks, as the job began; hosts: of each of them; committed: the step that the others go on from; joined:
    (number, host) of spares that have taken places of ranks.
    """
    back = f" from step {committed}" if committed < step - 1 else ""
    rest = f"{left} ranks go" if left > 1 else "1 rank goes"
    came = f"{_named(joined)} come{'s' * (len(joined) == 1)} in, " if joined else ""
    died = _named(zip(dead, hosts, strict=True))
    return f"{died} died in step {step}; {came}{rest} on{back} ({seconds:.1f} s)"


def _named(ranks):
    """Of [(rank, host)]: "ranks 1, 2 on n1 and rank 4 on n2"."""
    groups = []
    for name, some in itertools.groupby(ranks, lambda pair: pair[1]):
        some = [str(rank) for rank, _ in some]
        groups.append(f"rank{'s' * (len(some) > 1)} {', '.join(some)} on {name}")
    return " and ".join(groups)

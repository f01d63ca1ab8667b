"""A run goes on when ranks die: those that are left discard the unfinished step, and share its global batch out anew.

Each optimizer step is committed: it changes anything only after all ranks have agreed that their part of it has
succeeded (`mpi.survive`). So the ranks that are left hold the weights and moments of the same step. Where each holds
the whole model, they go on from memory; where ranks divide weights or moments between them, by way of a checkpoint: one
of that step, if those that are left hold all of it between them (copies of shards, or of what the tensor axis cuts),
else the newest there is. The order of samples knows no ranks.
"""

import contextlib
import copy
import itertools
import time
import traceback

from . import best, checkpoint, monitor, saving, stopping
from .errors import TooFewRanks, UsageError
from .log import due
from .mpi import launcher, on_root, regroup, survive
from .parallel import host
from .parallel import mesh as meshes
from .spikes import Spikes


def wanted(config, world):
    """Whether the run outlives ranks, as [resilience] of the run file and the job will have it. Collective.

    Raises UsageError, the same on every rank, where it must (shrink = true) and cannot.
    """
    if config.resilience.shrink is False:
        return False
    why = survive.refusal(world)
    if config.parallel.backend != "mpi":
        why = f'needs parallel.backend = "mpi", not "{config.parallel.backend}"'
    elif config.data.reader == "mpio":
        why = 'needs data.reader = "mapped": collective reads end with a rank that dies'
    if why and config.resilience.shrink is True:
        raise UsageError(f"resilience: shrink = true {why}").known_to_all()
    if why and launcher.fault_tolerant() and world.is_root:
        print(f"a rank that dies will end this job: to survive it {why}", flush=True)
    return why is None


class Survival:
    """What makes `run` (train.Run, its folder open) outlive ranks.

    committed: the step up to which all ranks have agreed; at_step: the weights in memory are that step's; deaths: how
    often ranks have died.
    """

    def __init__(self, run):
        self._run, self._comm, self._parallel = run, run.world.comm, run.placed.parallel
        self._hosts, self._armed = self._comm.allgather(run.world.host), False
        self._numbers = list(range(run.world.size))  # of the ranks as the job began, which is how users know them
        self.committed, self.at_step, self.deaths = run.state["step"], True, 0
        self._peak_of_one = run.peak / run.world.size
        run.progress.say("a rank that dies does not end this job: the others go on")

    def commit(self):
        """All ranks' part of the step under way has succeeded, or PeersDied is raised on all. Collective."""
        survive.commit(self._comm)
        self.committed = self._run.state["step"] + 1
        if not self._armed:
            survive.arm()
            self._armed = True

    def agree(self):
        """As `commit`, of something that is no step: what it has come to may decide what follows. Collective."""
        survive.commit(self._comm)

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

    def _too_few(self):
        """The results of a run that ends since it has lost too many ranks, None where it has not."""
        least, left = self._run.config.resilience.min_ranks, self._run.world.size
        if not self.deaths or left >= least:
            return None
        return self._run.stop(stopping.Wish(f"{left} of its ranks live, resilience.min_ranks is {least}"))

    def _agreed(self, error):
        """Of a death, whether all ranks have been told of it already; any other `error` is raised."""
        died = survive.died(self._comm, error) if self._armed else None
        if died is None:
            raise error
        traceback.clear_frames(error.__traceback__)  # which hold on to the model as it was
        return died.agreed

    def _recover(self, agreed):
        """Go on without those that have died, and without those that die meanwhile."""
        run, began, before, hosts = self._run, time.monotonic(), self._run.world, self._hosts
        step, unfinished = self.committed + 1, run.saver.abandon()
        while True:
            self._comm = survive.shrink(self._comm, agreed)
            try:
                self._rebuild(unfinished)
                survive.commit(self._comm)
                break
            except Exception as error:
                agreed = self._agreed(error)
        self.deaths += 1
        gone, seconds = survive.missing(before.comm, self._comm), round(time.monotonic() - began, 3)
        dead, where = ([some[rank] for rank in gone] for some in (self._numbers, hosts))
        self._numbers = [number for number in self._numbers if number not in dead]
        told = {"step": step, "ranks": dead, "hosts": where, "left": run.world.size, "seconds": seconds}
        run.journal.event("died", **told, goes_on_from=self.committed)
        run.progress.say(sentence(dead, where, step, run.world.size, seconds, self.committed))

    def _rebuild(self, unfinished):
        """All that knows the ranks, made anew for those that are left. Collective over these."""
        run, comm, folder = self._run, self._comm, self._run.config.run.output_dir
        run.world = world = regroup(comm)
        self._hosts = comm.allgather(world.host)
        newest = on_root(comm, _tidy, folder)
        # Nobody has taken a step that others have not, or `commit` is broken.
        steps = set(comm.allgather((self.committed, self.at_step)))
        alike = len(steps) == 1 and self.at_step and run.placed is not None
        if alike:
            self._agree_where()
        if alike and not run.placed.divided:
            self._go_on(self._layout(newest))
        else:
            if alike and run.placed.mesh.layout.pipeline == 1 and not run.placed.one_copy:
                newest = self._salvage() or newest
            self._go_back(self._layout(newest), newest)
        run.clock = monitor.Clock(world.group, run.placed.mesh.losses)
        run.journal = monitor.Journal(folder, run.state["restart"], world.is_root)
        run.requests.look(world.is_root)
        if world.is_root and run.progress.quiet:
            run.progress = monitor.Progress("train", run.plan.max_steps, run.state["step"])
        run.saver = run.new_saver(newest)
        run.owes = comm.bcast(unfinished is not None and unfinished != newest)
        # What ranks decide by, each for itself, must be the same on all of them.
        run.interval, run.spikes = comm.bcast((run.interval, run.spikes))
        run.back = run.checked = None
        run.watch_ranks()

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
        state |= comm.bcast(state)
        run.settled, run.best, run.scores = comm.bcast((run.settled, run.best, run.scores))

    def _go_on(self, layout):
        """From memory: each rank has the weights and the optimizer of the step committed last."""
        run = self._run
        run.placed = run.placed.moved(meshes.build(layout, run.world))
        run.peak = self._peak_of_one * run.world.size

    def _salvage(self):
        """The path of a checkpoint of the step committed last, where these ranks hold all of it between them."""
        run, state = self._run, self._run.state
        unmeasured = run.settled < state["step"] and due(state["step"], run.plan.eval_every_steps)
        kept = run.kept() | {"unmeasured": unmeasured}
        folder, tokenizer_dir = run.config.run.output_dir, run.config.data.tokenizer_dir
        how = tokenizer_dir, kept, run.config.checkpoint.keep, best.step(state)
        return saving.salvage(self._comm, folder, self.committed, run.placed, run.adjust, *how)

    def _go_back(self, layout, newest):
        """From the newest checkpoint, or the start: what the dead had is nowhere else."""
        run, state = self._run, {"step": 0, "samples": 0, "useful_s": 0.0, "nonfinite": 0}
        run.placed = run.adjust = None
        if newest:
            on_root(self._comm, checkpoint.verify, newest)
            state |= on_root(self._comm, checkpoint.read_state, newest)
        restart = run.state["restart"]
        run.state.clear()
        run.state.update(state, restart=restart)
        run.place(self._parallel, layout, newest)
        self.committed, self.at_step = state["step"], True
        run.spikes = Spikes(run.plan, state.get("spikes"))
        run.settle()


def _tidy(folder):
    """Path of the newest checkpoint in `folder` or None; what was not completed is removed. Root only."""
    checkpoint.rescue(folder)
    checkpoint.remove_unfinished(folder)
    found = checkpoint.find(folder)
    return found[-1] if found else None


def sentence(dead, hosts, step, left, seconds, committed):
    """Who has died, and how it goes on.

    dead: ranks, as the job began; hosts: of each of them; committed: the step that the others go on from.
    """
    groups = []
    for name, ranks in itertools.groupby(zip(dead, hosts, strict=True), lambda pair: pair[1]):
        ranks = [str(rank) for rank, _ in ranks]
        groups.append(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} on {name}")
    back = f" from step {committed}" if committed < step - 1 else ""
    rest = f"{left} ranks go" if left > 1 else "1 rank goes"
    return f"{' and '.join(groups)} died in step {step}; {rest} on{back} ({seconds:.1f} s)"

"""Training, from a run file to a trained model: what leads to the first step in `train`, what comes then in `Run`."""

import contextlib
import copy
import itertools
import math
import threading
import time

from . import (
    attention,
    best,
    checkpoint,
    deadline,
    evaluate,
    log,
    model,
    monitor,
    optimizer,
    outcome,
    recovery,
    replicas,
    revision,
    rollback,
    run_folder,
    saving,
    slow,
    sources,
    startup,
    stopping,
    utilisation,
)
from .data import batches
from .errors import CannotCreate, Corrupted, DataError, Diverged, IOFailure, UsageError
from .interval import Interval
from .log import due
from .mpi import on_root, together
from .parallel import compiled, host
from .parallel import mesh as meshes
from .parallel.apply import apply, check
from .plan import fit
from .quicken import quicken
from .spikes import Spikes
from .step import one_step
from .tasks import TASKS

_BRIEFLY_S = 0.3
_SLOW_DISK = 1e8  # bytes a second, as long as no checkpoint of the run tells better


def train(config, world, *, resume=False, overwrite=False, parts=None):
    """Train as `config` (config.Config) says on all ranks of `world` (mpi.World); returns the results dict.

    resume: continue from the newest complete checkpoint in run.output_dir, from the start if there is none.
    overwrite: replace a run that is there. Without either, an output folder that holds a run is refused (exit 73).
    A run that ends early because it was asked to (see `stopping`) has "stopped", why, in its results.
    parts: the startup.Parts of this process, told at the first step.
    Everything that can be refused is refused before anything is written. A rank whose `world` is that of a spare waits
    here, and returns as the others if it has taken a place among them; otherwise it leaves with them.
    """
    try:
        if world.waits:
            run = Run(config, world, None, {"step": 0})
            run.survival = recovery.Survival(run)
            return run.ending(run.survival.stand_by)
        return _train(config, world, resume, overwrite, parts)
    finally:
        _briefly(run_folder.unlock)


def _train(config, world, resume, overwrite, parts):
    survives = recovery.wanted(config, world)
    parallel, layout = lay_out(config, world, survives)
    data = sources.open_all(config, world)
    config = config.model_copy(update={"train": config.train.with_steps(len(data.training))})
    plan = config.train
    last, state, results = on_root(world.comm, run_folder.find_start, config, resume, overwrite)
    with together(world.comm):
        if plan.metric_for_best_model:
            best.check(plan, data.training.task.metrics((data.validation or data.training).meaning))
        best.forget_others(state, plan, data.validation and data.validation.stream.digest)
        batches.require(data.training, plan.global_batch_size, "a global batch needs")
        sources.check_same_run(config, data.training, state)
    if results is not None:
        return results
    parts = parts or startup.Parts()
    parts.end("data")
    run = Run(config, world, data, state)
    run.place(parallel, layout, last)
    run.open(resume, overwrite, last)
    if survives:
        run.survival = recovery.Survival(run)
    parts.end("model")
    return run.ending(run.go, parts)


def lay_out(config, world, survives=False):
    """(the run file's [parallel] with "auto" decided, mesh.Layout) of the ranks that there are. Collective.

    survives: ranks may die, and each keeps all that the others need to go on, if nothing else is asked for.
    """
    hosts, parallel = world.comm.allgather(world.host), config.parallel
    if survives and parallel.sharding == "auto":
        parallel = parallel.model_copy(update={"sharding": "none"})
    parallel = host.resolve(parallel, world, config.train.compile)
    with together(world.comm):
        layout = meshes.layout(parallel, hosts)
        config.train.accumulation(layout.data)
        if parallel.offload and layout.shard == 1:
            raise UsageError(
                f"parallel: offload = true keeps shards in host memory, but {layout.describe()} has none: two ranks or "
                "more must divide the weights between them"
            )
        if parallel.offload and world.device.type == "cpu":
            raise UsageError("parallel: offload = true spares the memory of GPUs, and these ranks compute on the CPU")
        if layout.pipeline > 1 and parallel.backend == "gloo" and world.device.type == "cuda":
            raise UsageError('parallel: backend = "gloo" sends no GPU memory between stages; take "mpi" or "nccl"')
    return parallel, layout


class Run:
    """A run under way: `place` gives its ranks a model, `open` its folder, and `go` takes steps until it is over.

    config: with the number of steps settled; sources: sources.Sources; state: what a checkpoint keeps of where a run
    is, as run_folder.find_start returns it; survival: recovery.Survival, None where a death ends the job. Methods are
    collective.
    """

    survival = placed = saver = interval = spikes = None
    peak = 0.0

    def __init__(self, config, world, data, state):
        self.config, self.plan, self.world, self.sources, self.state = config, config.train, world, data, state
        self.scores, self.told = {}, None  # of the newest evaluation, and its reports
        self.owes = False  # a checkpoint, that was given up
        self.settle()

    def settle(self):
        """All that was due after the newest step is done."""
        self.settled, self.best = self.state["step"], copy.deepcopy(self.state.get("best"))

    def place(self, parallel, layout, last):
        """The model on its ranks, with weights and optimizer of the checkpoint folder `last`, or new ones (None)."""
        config, plan, world = self.config, self.plan, self.world
        with together(world.comm):
            net, weights = self.load(last)
            check(net.config, layout, parallel.stages_per_rank, parallel.sequence)
            if plan.compile:
                compiled.require(world.device)
        self.again, self.why = fit.checkpointing(config, parallel, layout, world, net.config)
        with together(world.comm):
            self.prepare(net)
        self.peak, self.measured = utilisation.peak(world, plan.precision)
        self.take_part(net, weights, parallel, layout)
        del net, weights  # what other ranks hold of them
        with together(world.comm):
            if last:
                checkpoint.load_optimizer(last, self.placed, self.adjust)
        self.clock = monitor.Clock(world.group, self.placed.mesh.losses)

    def load(self, last):
        """The whole model, of the checkpoint folder `last` or a new one, and where its weights are. Not collective."""
        return load_or_build(self.config, last, self.sources.training)

    def prepare(self, net):
        """Make of the whole model what computes here, and count. Not collective."""
        if self.config.data.attention == "document":
            attention.keep_apart(net)
        quicken(net, self.world.device)
        self.operations = utilisation.count(net)
        self.trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)

    def take_part(self, net, weights, parallel, layout):
        """Make of the whole model `net` this rank's part of `layout`, with `weights`, and its optimizer."""
        config, plan, world = self.config, self.plan, self.world
        mesh = meshes.build(layout, world)
        targets = TASKS[config.model.task].target_fraction(config.data)
        how = {"low_precision": plan.precision == "bf16", "compile_blocks": plan.compile}
        self.placed = apply(net, mesh, parallel, self.again, world.device, targets, weights, **how)
        self.adjust = optimizer.build(self.placed, plan)
        self.adjust.register_step_pre_hook(lambda *_: self.saver.hold())

    def open(self, resume, overwrite, last):
        """The folder of the run, and who writes into it; see `train`."""
        config, plan, world, state, folder = self.config, self.plan, self.world, self.state, self.config.run.output_dir
        damaged = state.pop("damaged", [])
        on_root(world.comm, run_folder.open_output, config, resume, overwrite, damaged)
        if last:  # it has been verified, and a start that ended early has left one too many
            on_root(world.comm, checkpoint.delete_older, folder, config.checkpoint.keep, best.step(state))
        size_bytes = checkpoint.size_bytes(self.placed, plan)
        on_root(world.comm, checkpoint.require_room, folder, size_bytes)
        self.journal = monitor.Journal(folder, state["restart"], world.is_root)
        limit = config.run.time_limit and deadline.seconds(config.run.time_limit)
        save_s = state.pop("longest_save_s") or size_bytes / _SLOW_DISK
        self.requests = stopping.Requests(folder, world.is_root, limit, save_s)
        start = {"ranks": world.size, "hosts": world.hosts, "library": world.library}
        start |= {"spares": world.spares} if world.spares else {}
        start |= {"git": revision.of_code()} if world.is_root else {}
        start |= {"layout": self.placed.mesh.layout.describe(), "job": deadline.job(), "ends": self.requests.end}
        self.journal.event("start", step=state["step"], max_steps=plan.max_steps, **start)
        if damaged:
            self.journal.event("damaged", paths=list(map(str, damaged)))
        if self.sources.training.stream.left_out:
            self.journal.event("quarantine", shards=self.sources.training.stream.left_out)
        self.progress = monitor.Progress("train", plan.max_steps, state["step"], quiet=not world.is_root)
        self.progress.say(log.head(self, self.trained))
        self.progress.say(f"activation checkpointing: {'on' if self.again else 'off'} ({self.why})")
        peak = f"{self.peak / 1e12:.3g} TFLOP/s ({self.measured})"
        self.progress.say(f"peak of matrix products, {plan.precision}, all ranks: {peak}")
        self.saver = self.new_saver(last)
        self.interval = Interval(config.checkpoint.every_steps, deadline.seconds(config.checkpoint.mtbf))
        self.spikes, self.back, self.checked = Spikes(plan, state.get("spikes")), None, None
        self.watch_ranks()

    def new_saver(self, newest):
        """A saving.Saver of what is placed; newest: path of the newest checkpoint, or None."""
        config = self.config
        keeping = config.run.output_dir, config.data.tokenizer_dir, config.checkpoint.keep
        how = {"newest": newest, "completed": self.saved, "unfit": self.unfit, "doubted": self.doubted}
        return saving.Saver(self.world.comm, self.placed, self.adjust, *keeping, **how)

    def watch_ranks(self):
        """Begin to look for slow ranks."""
        world, layout = self.world, self.placed.mesh.layout
        self.hosts = world.comm.allgather(world.host)
        stages = [layout.place(rank)["pipeline"] for rank in range(world.size)]
        self.watch = slow.Watch(world.comm, self.hosts, self.plan.slow_rank_ratio, stages)

    def go(self, parts):
        """Steps until the run is over, or is asked to end; returns its results. parts: startup.Parts."""
        return self.survival.go(parts) if self.survival else self.steps(parts)

    def ending(self, work, *arguments):
        """`work(*arguments)`; an error that ends it is told among the events too, where that can be at once."""
        try:
            return work(*arguments)
        except Exception as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[-1]  # of another rank's traceback, too
            details = {"step": self.state.get("step"), "why": why, "exit_code": getattr(error, "code", 1)}

            _briefly(lambda: self.journal.event("failed", **details))
            raise

    def steps(self, parts=None):
        """As `go`; ranks that have lost others call it again."""
        try:
            self.until_over(parts)
        except stopping.Asked as asked:
            return self.stop(asked.wish)
        try:
            return outcome.results(self)
        except stopping.Asked as asked:  # all else is saved
            return self.leave(asked.wish)

    def until_over(self, parts):
        """Steps, and what is due after them. Raises stopping.Asked where the run is to end before its last one."""
        plan, state = self.plan, self.state
        if self.owes:
            state["unmeasured"] = self.owes_scores
            self.save(waits=not self.config.checkpoint.asynchronous)
            self.owes = False
        self.make_up()
        done = state["step"] == plan.max_steps or best.hopeless(state, plan)
        if self.settled < state["step"]:
            done = self.after_step()
        steps = self.batches()
        while not done:
            wish = self.granted(stopping.wish(self.take_step(steps, parts)))
            parts = None
            if self.back:
                steps.close()
                self.go_back()
                self.make_up()
                steps = self.batches()
                if not (wish and wish.ends):
                    continue
            if due(state["step"], plan.check_replicas_every_steps):
                self.check_replicas()
            if wish and wish.ends and state["step"] < plan.max_steps:
                raise stopping.Asked(wish)
            done = self.after_step(wish)

    def make_up(self):
        """The evaluation for which there was no time when this checkpoint was written. Raises stopping.Asked."""
        if self.state.pop("unmeasured", False) and self.settled == self.state["step"]:
            self.measure()
            improved = self.better()
            self.settle()
            if improved:
                self.save(waits=True)

    def granted(self, wish):
        """`wish`, or None where the run is to go on with no more ranks than it has."""
        if wish is None or wish.ranks is None or wish.ranks > self.world.size:
            return wish
        ranks = f"the {self.world.size} that there are"
        self.progress.say(f"the file {stopping.GROW} names no number of ranks above {ranks}, and is removed")
        return None

    def after_step(self, wish=None):
        """The evaluation and the checkpoint that are due, or wished for; returns whether the run is over."""
        plan, state, improved = self.plan, self.state, False
        done = state["step"] == plan.max_steps
        if done or due(state["step"], plan.eval_every_steps):
            self.measure()
            improved = self.better()
            done = done or best.hopeless(state, plan)
        if done:
            self.save_last()
        elif improved or wish or (self.interval.due(state["step"]) and not self.spikes.under_way):
            self.save(waits=not self.config.checkpoint.asynchronous)
        self.settle()
        return done

    def go_back(self):
        """To a checkpoint before the losses jumped (`rollback`)."""
        with self.survival.changing() if self.survival else contextlib.nullcontext():
            rollback.go_back(self, self.back)
        self.settle()

    def batches(self):
        """This rank's micro-batches of each step to come, the next ones being made meanwhile."""
        data, source, plan = self.placed.mesh.data, self.sources.training, self.plan
        positions = itertools.count(self.state["samples"], plan.global_batch_size)
        return batches.ahead(
            lambda position: source.training_step(position, data.rank, data.size, plan),
            itertools.islice(positions, plan.max_steps - self.state["step"]),
            self.config.data.reader != "mpio",
        )

    def take_step(self, steps, parts=None):
        """One step with the next of `steps`; returns the largest of what ranks have heard (stopping.Requests.heard).

        parts: startup.Parts, at the first.
        """
        plan, state, clock = self.plan, self.state, self.clock
        clock.start()
        with clock.waiting_for_data():
            micro_batches = next(steps)
        rate = optimizer.learning_rate(state["step"], plan)
        commit = self.survival and self.survival.commit
        found = one_step(self.placed, self.adjust, micro_batches, rate, self.sources.training, plan, commit)
        loss_sum, targets, tokens, pairs, grad_norm = found
        soon = [state["step"] + 1, state["step"] + 2]
        measures = plan.max_steps in soon or any(due(step, plan.eval_every_steps) for step in soon)
        saving = self.saver.under_way
        heard = self.requests.heard(measures, 1 + saving)
        loss_sum, times, heard, saved = clock.collect(loss_sum, heard, self.saver.report())
        self.interval.stepped(times["step_s"], saving)
        self.saver.advance(saved)
        state["step"] += 1
        state["samples"] += plan.global_batch_size
        state["useful_s"] += times["step_s"]
        times["mfu"] = self.operations.step(tokens, targets, pairs) / times["step_s"] / self.peak
        times["tokens_per_s"] = tokens / times["step_s"]
        log.step(self, loss_sum / targets, rate, grad_norm, times)
        log.pace(self, *self.watch.step(clock.compute_s))
        self.judge(loss_sum / targets, rate, grad_norm)
        if parts:
            parts.end("first step")
            log.first_step(self, parts)
        else:  # the first one compiles and measures
            self.requests.took("step", times["step_s"])
        return heard

    def judge(self, loss, rate, grad_norm):
        """Count steps that are no number, which the optimizer has left out, and spikes: the run goes back before step
        `back`. Raises Diverged where too many are no number and it does not go back."""
        plan, state, finite = self.plan, self.state, math.isfinite(loss) and math.isfinite(grad_norm)
        state["nonfinite"] = 0 if finite else state["nonfinite"] + 1
        if not finite:
            self.journal.event("nonfinite", step=state["step"], left_out=not math.isfinite(grad_norm))
        self.back = self.spikes.seen(state["step"], loss, state["nonfinite"])
        if state["nonfinite"] > plan.max_nonfinite_steps and not self.back:
            with contextlib.suppress(IOFailure):  # which would have the run started again
                self.saver.finish()
            times = f" (the {state['nonfinite']}th in a row)" if state["nonfinite"] > 1 else ""
            raise Diverged(
                f"step {state['step']}{times}: loss {loss}, gradient norm {grad_norm}: the run has diverged at "
                f"learning rate {rate:.3g}; newest checkpoint: {self.saver.newest or 'none'}"
            ).known_to_all()

    def measure(self):
        """Evaluate on the validation data, where there are any. Raises stopping.Asked."""
        if not self.sources.validation:
            return
        began = time.monotonic()
        self.state["unmeasured"] = True
        scores, self.told = self.evaluated(self.sources.validation, "eval")
        scores = self.world.comm.bcast(scores, root=0)  # what follows is decided by them, on every rank
        if self.survival:
            self.survival.agree()
        self.state["unmeasured"] = False
        self.scores = scores
        log.scores(self, self.scores)
        self.requests.took("evaluation", time.monotonic() - began)

    def evaluated(self, source, prefix):
        """What `evaluate.evaluate` says of `source`. Raises stopping.Asked where the run is to end meanwhile."""

        def heard():
            unsaved = not self.is_saved
            more = unsaved and self.state["step"] < self.plan.max_steps
            return self.requests.heard_meanwhile(unsaved + self.saver.under_way, steps=more)

        def act(wish):
            if self.granted(wish):
                raise stopping.Asked(wish)

        ear = stopping.Ear(heard, self.clock.largest, act)
        how = self.plan.micro_batch_size, self.plan.precision
        return evaluate.evaluate(self.placed, source, *how, prefix, ear)

    def better(self):
        """Whether the newest scores are the best so far, which `state` then says."""
        validation = self.sources.validation
        return best.compare(self.state, self.plan, self.scores, validation and validation.stream.digest)

    def check_replicas(self):
        """Compare the bits that ranks hold alike, once a step; raises Corrupted where they differ."""
        step = self.state["step"]
        if self.checked == step:
            return
        try:
            replicas.check(self.world.comm, self.placed, self.adjust, step, self.hosts)
        except Corrupted as error:
            with contextlib.suppress(IOFailure):  # it was good when that checkpoint began
                self.saver.finish()
            raise Corrupted(log.corrupted(self, error), error.tensors).known_to_all() from None
        self.checked = step

    def save(self, waits):
        """Begin a checkpoint, which is complete on return if this `waits`."""
        if self.plan.check_replicas_every_steps:
            self.check_replicas()
        self.saver.settle()  # which may tell that the best one is gone
        self.interval.began()
        self.saver.begin(self.state["step"], self.kept(), best.step(self.state), copy=not waits)
        if waits:
            self.saver.finish()

    def kept(self):
        """What a checkpoint keeps of `state`, and by what it knows the run."""
        state = self.state
        kept = {name: state[name] for name in ("samples", "useful_s", "nonfinite")}
        return kept | {
            "unmeasured": state.get("unmeasured", False),
            "ranks": self.world.size,
            "data_digest": self.sources.training.stream.digest,
            "config": self.config.model_dump(exclude_none=True),
            "best": copy.deepcopy(state.get("best")),  # evaluations that come before it is written count on
            "spikes": self.spikes.state,
        }

    def save_last(self):
        """The last checkpoint of this start, complete on return. Raises Diverged where it is not fit to be one."""
        self.save(waits=True)
        step, newest = self.state["step"], self.saver.newest
        if newest is None or newest.name != f"checkpoint-{step}":
            why = f"step {step}: weights or the optimizer's state are no longer finite, so they are not saved"
            raise Diverged(f"{why}; newest checkpoint: {newest or 'none'}").known_to_all()

    def saved(self, step, path, seconds, waited_s):
        """A checkpoint is complete."""
        self.requests.took("save", seconds)
        if self.world.is_root:  # which it may not have been from the start
            with contextlib.suppress(CannotCreate, OSError):
                run_folder.lock(self.config.run.output_dir, 0)
        # Before root writes, which may fail there alone.
        told = self.world.comm.allgather((waited_s, seconds)) if self.interval.auto else None
        times = {"seconds": round(seconds, 3), "waited_s": round(waited_s, 3)}
        self.journal.event("checkpoint", step=step, path=str(path), **times)
        if told:
            log.interval(self, self.interval.saved(*map(max, zip(*told, strict=True))))

    def doubted(self, error, path):
        """A checkpoint is not what was written, or not known to be, or older ones cannot be deleted."""
        state, folder = self.state, self.config.run.output_dir
        if best.step(state) == checkpoint.step_of(path):
            known = state["best"]
            state["best"] = None
            with contextlib.suppress(DataError, IOFailure):  # on all ranks
                state["best"] = on_root(self.world.comm, run_folder.best_there_is, folder, known)
            self.best = copy.deepcopy(state["best"])
        self.progress.say(f"{error}; newest checkpoint: {self.saver.newest or 'none'}")
        self.journal.event("doubted", step=checkpoint.step_of(path), path=str(path), why=str(error))

    def unfit(self, step):
        """A checkpoint is not written, since not all of its numbers are finite."""
        self.journal.event("unfit", step=step)
        self.progress.say(f"step {step}: not saved, for weights or the optimizer's state are no longer finite")

    @property
    def is_saved(self):
        """Whether the newest checkpoint has all that there is to keep."""
        step, newest = self.state["step"], self.saver.newest
        return self.settled == step and newest is not None and checkpoint.step_of(newest) == step

    @property
    def owes_scores(self):
        """Whether an evaluation that is due has not been made."""
        step, plan = self.state["step"], self.plan
        now = self.settled < step and (step == plan.max_steps or due(step, plan.eval_every_steps))
        return now or self.state.get("unmeasured", False)

    def stop(self, wish):
        """End early, saved; an evaluation that was due is made up for when the run goes on. Returns the results."""
        self.saver.skip_reading()
        if not self.is_saved:
            self.state["unmeasured"] = self.owes_scores
            self.save_last()
        return self.leave(wish)

    def leave(self, wish):
        """As `stop`, of what is saved."""
        log.stopped(self, wish)
        state = self.state
        where = {"step": state["step"], "samples": state["samples"], "checkpoint": str(self.saver.newest)}
        return {**where, "stopped": wish.why, "exit_code": wish.code}


def _briefly(work):
    """`work()`, which may fail, for no longer than `_BRIEFLY_S`.

    A file system in trouble must not keep root from saying what is wrong: the others wait for it a second.
    """

    def quietly():
        with contextlib.suppress(Exception):
            work()

    with contextlib.suppress(RuntimeError):  # no more threads
        thread = threading.Thread(target=quietly, daemon=True)
        thread.start()
        thread.join(_BRIEFLY_S)


def load_or_build(config, last, source):
    """The model of the newest checkpoint, or a new one, and where its weights come from; see `model.build`."""
    if last is None:
        how = config.train.sequence_length, config.run.seed, source.stream.labelled
        return model.build(config.model, source.vocabulary, *how, config.lora)
    net, weights = model.resume(last, config.model.task, config.model.freeze)
    model.check_fits(net, source.vocabulary, config.train.sequence_length)
    return net, weights

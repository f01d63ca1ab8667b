"""Training, from a run file to a trained model: the story in `train`, its parts below it in the order they appear."""

import contextlib
import itertools
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

from . import (
    attention,
    best,
    checkpoint,
    deadline,
    evaluate,
    files,
    model,
    monitor,
    optimizer,
    run_folder,
    saving,
    startup,
    stopping,
    utilisation,
)
from .config import Lora
from .data import batches, examples
from .errors import DataError, Diverged, IOFailure, UsageError
from .mpi import choose, device, on_root, together
from .names import OF_EXAMPLES, OF_TEXT
from .parallel import compiled, host
from .parallel import mesh as meshes
from .parallel.apply import apply, check
from .plan import fit
from .quicken import quicken
from .tasks import TASKS

_SLOW_DISK = 1e8  # bytes a second, as long as no checkpoint of the run tells better


def train(config, world, *, resume=False, overwrite=False, parts=None):
    """Train as `config` (config.Config) says on all ranks of `world` (mpi.World); returns the results dict.

    resume: continue from the newest complete checkpoint in run.output_dir, from the start if there is none.
    overwrite: replace a run that is there. Without either, an output folder that holds a run is refused (exit 73).
    A run that ends early because it was asked to (see `stopping`) has "stopped", why, in its results.
    parts: the startup.Parts of this process, told at the first step.
    Everything that can be refused is refused before anything is written.
    """
    hosts = world.comm.allgather(world.host)
    parallel = host.resolve(config.parallel, world, config.train.compile)
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
    words = on_root(world.comm, read_tokenizer, config.data.tokenizer_dir, config.data.train)
    source = open_source(config, world, config.data.train, words)
    config = config.model_copy(update={"train": config.train.with_steps(len(source))})
    plan = config.train
    names = source.stream.labelled and examples.labels_of(source.stream)
    held_out = config.data.validation, config.data.test
    validation, test = (folder and open_source(config, world, folder, words, names) for folder in held_out)
    last, state, results = on_root(world.comm, run_folder.find_start, config, resume, overwrite)
    with together(world.comm):
        if plan.metric_for_best_model:
            best.check(plan, source.task.metrics((validation or source).meaning))
        best.forget_others(state, plan, validation and validation.stream.digest)
        batches.require(source, plan.global_batch_size, "a global batch needs")
        check_same_run(config, source, state)
    if results is not None:
        return results
    parts = parts or startup.Parts()
    parts.end("data")
    with together(world.comm):
        net, weights = load_or_build(config, last, source)
        check(net.config, layout, parallel.stages_per_rank, parallel.sequence)
        if plan.compile:
            compiled.require(world.device)
    again, why = fit.checkpointing(config, parallel, layout, world, net.config)
    with together(world.comm):
        if config.data.attention == "document":
            attention.keep_apart(net)
        quicken(net, world.device)
        operations = utilisation.count(net)
        trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    peak, how = utilisation.peak(world, plan.precision)
    mesh = meshes.build(layout, world)
    targets = TASKS[config.model.task].target_fraction(config.data)
    placed = apply(
        net,
        mesh,
        parallel,
        again,
        world.device,
        targets,
        weights,
        low_precision=plan.precision == "bf16",
        compile_blocks=plan.compile,
    )
    del net, weights  # what other ranks hold of them
    adjust = optimizer.build(placed, plan)
    with together(world.comm):
        if last:
            checkpoint.load_optimizer(last, placed, adjust)
    damaged = state.pop("damaged", [])
    on_root(world.comm, run_folder.open_output, config, resume, overwrite, damaged)
    size_bytes = checkpoint.size_bytes(placed, plan)
    on_root(world.comm, checkpoint.require_room, config.run.output_dir, size_bytes)
    journal = monitor.Journal(config.run.output_dir, state["restart"], world.is_root)
    start = {"ranks": world.size, "hosts": world.hosts, "library": world.library, "layout": layout.describe()}
    limit = config.run.time_limit and deadline.seconds(config.run.time_limit)
    save_s = state.pop("longest_save_s") or size_bytes / _SLOW_DISK
    requests = stopping.Requests(config.run.output_dir, world.is_root, limit, save_s)
    journal.event("start", step=state["step"], max_steps=plan.max_steps, job=deadline.job(), ends=requests.end, **start)
    if damaged:
        journal.event("damaged", paths=list(map(str, damaged)))
    if source.stream.left_out:
        journal.event("quarantine", shards=source.stream.left_out)
    progress = monitor.Progress("train", plan.max_steps, state["step"], quiet=not world.is_root)
    progress.say(describe(config, world, placed, source, validation, state, trained))
    progress.say(f"activation checkpointing: {'on' if again else 'off'} ({why})")
    progress.say(f"peak of matrix products, {plan.precision}, all ranks: {peak / 1e12:.3g} TFLOP/s ({how})")
    parts.end("model")

    def told_of(step, path, seconds, waited_s):
        requests.took("save", seconds)
        times = {"seconds": round(seconds, 3), "waited_s": round(waited_s, 3)}
        journal.event("checkpoint", step=step, path=str(path), **times)

    keeping = config.run.output_dir, config.data.tokenizer_dir, config.checkpoint.keep
    saver = saving.Saver(world.comm, placed, adjust, *keeping, newest=last, completed=told_of)
    adjust.register_step_pre_hook(lambda *_: saver.hold())

    def save(waits):
        kept = {
            "samples": state["samples"],
            "useful_s": state["useful_s"],
            "nonfinite": state["nonfinite"],
            "unmeasured": state.get("unmeasured", False),
            "ranks": world.size,
            "data_digest": source.stream.digest,
            "config": config.model_dump(exclude_none=True),
            "best": state.get("best"),
        }
        saver.begin(state["step"], kept, best.step(state), copy=not waits)
        if waits:
            saver.finish()

    def measure():
        if not validation:
            return {}, None
        began = time.monotonic()
        scores, told = evaluate.evaluate(placed, validation, plan.micro_batch_size, plan.precision)
        scores = world.comm.bcast(scores, root=0)  # what follows is decided by them, on every rank
        journal.metrics({"step": state["step"], "samples": state["samples"], **scores})
        shown = ("loss", "accuracy", "f1", "pearson", plan.metric_for_best_model)
        shown = (f"eval_{name}" for name in dict.fromkeys(shown))
        numbers = (f"{name}={scores[name]:.4f}" for name in shown if name in scores)
        progress.say(f"step {state['step']} {' '.join(numbers)}")
        requests.took("evaluation", time.monotonic() - began)
        return scores, told

    def better():
        return best.compare(state, plan, scores, validation and validation.stream.digest)

    clock, scores, told = monitor.Clock(world.group, mesh.losses), {}, None
    if state.pop("unmeasured", False):  # there was no time for it when the run was asked to end
        scores, told = measure()
        if better():
            save(waits=True)
    positions = itertools.count(state["samples"], plan.global_batch_size)
    todo = itertools.islice(positions, plan.max_steps - state["step"])
    steps = batches.ahead(
        lambda position: source.training_step(position, mesh.data.rank, mesh.data.size, plan),
        todo,
        config.data.reader != "mpio",
    )
    done = state["step"] == plan.max_steps or best.hopeless(state, plan)
    while not done:
        clock.start()
        with clock.waiting_for_data():
            micro_batches = next(steps)
        rate = optimizer.learning_rate(state["step"], plan)
        loss_sum, targets, tokens, pairs, grad_norm = one_step(placed, adjust, micro_batches, rate, source, plan)
        soon = [state["step"] + 1, state["step"] + 2]
        measures = plan.max_steps in soon or any(due(step, plan.eval_every_steps) for step in soon)
        heard = requests.heard(measures, 1 + saver.under_way)
        loss_sum, times, heard, saved = clock.collect(loss_sum, heard, saver.report())
        saver.advance(saved)
        state["step"] += 1
        state["samples"] += plan.global_batch_size
        state["useful_s"] += times["step_s"]
        if math.isfinite(loss_sum) and math.isfinite(grad_norm):
            state["nonfinite"] = 0
        else:
            state["nonfinite"] += 1
            journal.event("nonfinite", step=state["step"], left_out=not math.isfinite(grad_norm))
        times["mfu"] = operations.step(tokens, targets, pairs) / times["step_s"] / peak
        times["tokens_per_s"] = tokens / times["step_s"]
        report(journal, progress, plan, state, loss_sum / targets, rate, grad_norm, times, saver)
        if parts:
            parts.end("first step")
            tell_start(parts, journal, progress, world)
            parts = None
        else:  # the first one compiles and measures
            requests.took("step", times["step_s"])
        done, improved, wish = state["step"] == plan.max_steps, False, stopping.wish(heard)
        ends = bool(wish and wish.ends and not done)
        if done or due(state["step"], plan.eval_every_steps):
            if ends:
                state["unmeasured"] = True
            else:
                scores, told = measure()
                improved = better()
                done = done or best.hopeless(state, plan)
        if done or improved or wish or due(state["step"], config.checkpoint.every_steps):
            save(waits=done or ends or not config.checkpoint.asynchronous)
        if ends:
            return stop(journal, progress, plan, state, saver.newest, wish)
    if not scores:  # of a run that ended between its last checkpoint and its results
        scores, told = measure()
    progress.close()
    path = saver.newest
    results = {"step": state["step"], "samples": state["samples"], "checkpoint": str(path), **scores}
    if state.get("best"):
        results |= best.results(state, config)
    if source.stream.labelled:
        if results["checkpoint"] != str(path):
            with together(world.comm):
                placed.refill(model.saved(results["checkpoint"]))
            scores, told = {}, None  # were of other weights
        results |= finish(config, world, placed, validation, test, progress, scores, told)
    on_root(world.comm, files.write_json, Path(config.run.output_dir) / "results.json", results)
    journal.event("communication", choices=choose.made())
    journal.event("end", **results)
    return results


def read_tokenizer(folder, data=None):
    """(model.Vocabulary, hash, folder) of the tokenizer in `folder`. Root only: the others are told.

    data: the folder of shards that it is for, which is missed first where nothing was prepared.
    """
    from .data import shards, tokenizer

    if data is not None:
        shards.read_manifest(data)
    loaded = tokenizer.load(folder)
    return model.vocabulary(loaded), tokenizer.tokenizer_hash(loaded), folder


def open_source(config, world, folder, words, names=None):
    """The samples of the shards in `folder`, checked against task and tokenizer: a data.batches.Source of text or
    data.examples.Examples. Collective.

    words: what `read_tokenizer` returned; names: (kind, names) of the labels that these must have.
    """
    from .data import shards, tokenizer

    leave_out = config.data.quarantine and folder == config.data.train
    stream = shards.open_folder(folder, reader=config.data.reader, comm=world.comm, quarantine=leave_out)
    task = TASKS[config.model.task]
    vocabulary, tokenizer_hash, tokenizer_dir = words
    with together(world.comm):
        tokenizer.check_same(stream, tokenizer_dir, tokenizer_hash)
        task.check(vocabulary)
        if stream.labelled and config.model.task not in OF_EXAMPLES:
            raise DataError(f"data: {folder} holds labelled examples, {config.model.task} learns from text")
        if stream.labelled or config.model.task not in OF_TEXT:
            config.check_examples()
            return examples.open_part(stream, task, vocabulary, config, world.device, names)
        config.check_text()
        how = config.train.sequence_length, config.data.mlm_probability, config.run.seed, config.data.attention
        source = batches.Source(stream, task, vocabulary, *how)
        batches.require(source, 1, f"{folder}: a run needs at least")
    return source


def check_same_run(config, source, state):
    """Refuse to continue a run whose data, model or order the run file has changed since."""
    saved = state.get("config")
    if saved is None:
        return
    now = config.model_dump(exclude_none=True)
    fixed = (
        ("run", "seed"),
        ("model", "task"),
        ("model", "config"),
        ("train", "sequence_length"),
        ("train", "optimizer"),
        *(("lora", key) for key in Lora.model_fields),
    )
    for section, key in fixed:
        was, is_ = saved.get(section, {}).get(key), now.get(section, {}).get(key)
        if was != is_:
            raise DataError(f"--resume: {section}.{key} was {was} when the checkpoint was written and is {is_} now")
    if state["data_digest"] != source.stream.digest:
        raise DataError(
            f"--resume: the shards of {config.data.train} are not those of the checkpoint "
            f"(digest {source.stream.digest[:12]}, checkpoint {state['data_digest'][:12]})"
        )


def load_or_build(config, last, source):
    """The model of the newest checkpoint, or a new one, and where its weights come from; see `model.build`."""
    if last is None:
        how = config.train.sequence_length, config.run.seed, source.stream.labelled
        return model.build(config.model, source.vocabulary, *how, config.lora)
    net, weights = model.resume(last, config.model.task, config.model.freeze)
    model.check_fits(net, source.vocabulary, config.train.sequence_length)
    return net, weights


def describe(config, world, placed, source, validation, state, trained):
    """The lines at the head of a run: who runs what on how much. trained: parameters that are not frozen."""
    parameters = sum(piece.shape.numel() for piece in placed.pieces.values())
    layout = placed.mesh.layout
    how = f"layout: {layout.describe()}"
    if layout.shard > 1:
        how += f", sharding {placed.parallel.sharding} over {layout.shard} ranks"
    plan = config.train
    epochs = plan.max_steps * plan.global_batch_size / len(source)
    evaluated = f", {len(validation)} validation samples" if validation else ""
    count = plan.accumulation(layout.data)
    learnt = f", {trained / 1e6:.3g} M of them trained" if trained < parameters else ""
    up_to = "up to " if source.stream.labelled else ""
    name, where = model.class_name(placed.model), str(world.device)
    if world.device.type == "cpu":
        kept = "kept" if device.keeps_memory() else "given back (HPCLLM_MALLOC)"
        threads = torch.get_num_threads()
        where += f", {threads} thread{'s' if threads > 1 else ''} a rank, freed memory is {kept}"
    return (
        f"{world.describe()}\n{how}\n"
        f"{config.model.task}: {name}, {parameters / 1e6:.1f} M parameters{learnt}, {plan.precision} on {where}\n"
        f"{len(source)} samples of {up_to}{plan.sequence_length} tokens{evaluated}; {plan.max_steps} steps of "
        f"{plan.global_batch_size} sequences = {epochs:.2f} epochs; {count} micro-batch{'es' * (count > 1)} of "
        f"{plan.micro_batch_size} per rank and step"
        + (f"\ncontinuing from step {state['step']}" if state["step"] else "")
    )


def one_step(placed, adjust, micro_batches, rate, source, plan):
    """Forward and backward of this rank's micro-batches of `source` and one optimizer step.

    Returns (loss summed over this rank's targets; targets, tokens, and pairs of tokens that attend, of all ranks;
    gradient norm before clipping). Each rank's loss is a sum, divided by the global number of targets; gradients are
    summed over ranks.
    """
    placed.train()
    counts = [[batch.targets, batch.tokens, batch.pairs] for batch in micro_batches]
    count = torch.tensor(counts, dtype=torch.float64).sum(0)  # exact for whole numbers, and weights may be none
    dist.all_reduce(count, group=placed.mesh["data"])
    targets, tokens, pairs = count.tolist()
    targets = targets or 1.0
    optimizer.set_learning_rate(adjust, rate)
    adjust.zero_grad()
    work = evaluate.of_task(source, placed, plan.precision)
    losses = placed.step(micro_batches, work, targets)
    loss_sum = torch.stack(losses).double().sum() if losses else 0.0
    grad_norm = placed.clip_gradients(plan.max_grad_norm)
    if math.isfinite(grad_norm):  # the same on all ranks
        adjust.step()
    return loss_sum, targets, tokens, pairs, grad_norm


def finish(config, world, placed, validation, test, progress, scores, told):
    """Evaluate the run's result on labelled validation and test data, write reports, return the scores. Collective.

    scores, told: of the validation data, where they are of these weights; else empty and None.
    """
    scores, how = dict(scores), (config.train.micro_batch_size, config.train.precision)
    for prefix, source in (("eval", validation), ("test", test)):
        if source:
            known = prefix == "eval" and scores
            found, report = (scores, told) if known else evaluate.evaluate(placed, source, *how, prefix)
            on_root(world.comm, evaluate.write, config.run.output_dir, prefix, found, report, source.meaning)
            if report:
                progress.say(f"{prefix}: {source.stream.folder}\n{report[0]}")
            scores |= world.comm.bcast(found, root=0)
    return scores


def stop(journal, progress, plan, state, path, wish):
    """End a run early, which is saved in `path`; returns its results."""
    progress.close()
    why, step = wish.why, state["step"]
    journal.event("stop", step=step, why=why)
    again = "delete it, and the" if wish.code == 0 else "the"
    progress.say(f"stopped after step {step} of {plan.max_steps} ({why}), saved in {path}; {again} same command with "
                 "--resume goes on")  # fmt: skip
    return {"step": step, "samples": state["samples"], "checkpoint": str(path), "stopped": why, "exit_code": wish.code}


def tell_start(parts, journal, progress, world):
    """Log, and keep as an event, the parts of the start on the rank where it took longest. Collective."""
    everybody = world.comm.gather(parts, root=0)
    if world.is_root:
        slowest = max(everybody, key=lambda one: sum(one.seconds.values()))
        journal.event("first_step", seconds={name: round(taken, 3) for name, taken in slowest.seconds.items()})
        progress.say(f"first step after {slowest.describe()}")


def due(step, every):
    return every > 0 and step % every == 0


def report(journal, progress, plan, state, loss, rate, grad_norm, times, saver):
    """One record and, every log_every_steps, one line: greppable key=value pairs."""
    tokens_per_s = times["tokens_per_s"]
    record = {"loss": loss, "learning_rate": rate, "grad_norm": grad_norm, **times, "useful_s": state["useful_s"]}
    journal.metrics({"step": state["step"], "samples": state["samples"], **record})
    if state["nonfinite"] > plan.max_nonfinite_steps:
        with contextlib.suppress(IOFailure):  # which would have the run started again
            saver.finish()
        times = f" (the {state['nonfinite']}th in a row)" if state["nonfinite"] > 1 else ""
        raise Diverged(
            f"step {state['step']}{times}: loss {loss}, gradient norm {grad_norm}: the run has diverged at learning "
            f"rate {rate:.3g}; newest checkpoint: {saver.newest or 'none'}"
        ).known_to_all()
    text = (
        f"step {state['step']}/{plan.max_steps} loss={loss:.4f} lr={rate:.3e} grad_norm={grad_norm:.3f} "
        f"tokens/s={tokens_per_s:.0f} step_s={times['step_s']:.3f} data_s={times['data_s']:.3f} "
        f"communication_s={times['communication_s']:.3f} mfu={times['mfu']:.3f} "
        f"memory_MiB={times['memory_bytes'] >> 20}"
    )
    told = due(state["step"], plan.log_every_steps) or state["step"] in (1, plan.max_steps)
    progress.update(state["step"], text if told else None, f"loss {loss:.3f}, {tokens_per_s:.0f} tokens/s")

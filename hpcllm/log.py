"""What a run (train.Run) says on the way: who runs what on how much, a line every few steps, how it ended."""

import torch

from . import model
from .mpi import device


def head(run, trained):
    """The lines at the head of a run: who runs what on how much. trained: parameters that are not frozen."""
    config, plan, world, placed = run.config, run.plan, run.world, run.placed
    parameters = sum(piece.shape.numel() for piece in placed.pieces.values())
    layout = placed.mesh.layout
    how = f"layout: {layout.describe()}"
    if layout.shard > 1:
        how += f", sharding {placed.parallel.sharding} over {layout.shard} ranks"
    training, validation = run.sources.training, run.sources.validation
    epochs = plan.max_steps * plan.global_batch_size / len(training)
    evaluated = f", {len(validation)} validation samples" if validation else ""
    count = plan.accumulation(layout.data)
    learnt = f", {trained / 1e6:.3g} M of them trained" if trained < parameters else ""
    up_to = "up to " if training.stream.labelled else ""
    name, where = model.class_name(placed.model), str(world.device)
    if world.device.type == "cpu":
        kept = "kept" if device.keeps_memory() else "given back (HPCLLM_MALLOC)"
        threads = torch.get_num_threads()
        where += f", {threads} thread{'s' if threads > 1 else ''} a rank, freed memory is {kept}"
    return (
        f"{world.describe()}\n{how}\n"
        f"{config.model.task}: {name}, {parameters / 1e6:.1f} M parameters{learnt}, {plan.precision} on {where}\n"
        f"{len(training)} samples of {up_to}{plan.sequence_length} tokens{evaluated}; {plan.max_steps} steps of "
        f"{plan.global_batch_size} sequences = {epochs:.2f} epochs; {count} micro-batch{'es' * (count > 1)} of "
        f"{plan.micro_batch_size} per rank and step"
        + (f"\ncontinuing from step {run.state['step']}" if run.state["step"] else "")
    )


def first_step(run, parts):
    """Log, and keep as an event, the `parts` of the start on the rank where it took longest. Collective."""
    everybody = run.world.comm.gather(parts, root=0)
    if run.world.is_root:
        slowest = max(everybody, key=lambda one: sum(one.seconds.values()))
        run.journal.event("first_step", seconds={name: round(taken, 3) for name, taken in slowest.seconds.items()})
        run.progress.say(f"first step after {slowest.describe()}")


def step(run, loss, rate, grad_norm, times):
    """One record and, every log_every_steps, one line: greppable key=value pairs."""
    plan, state, tokens_per_s = run.plan, run.state, times["tokens_per_s"]
    record = {"loss": loss, "learning_rate": rate, "grad_norm": grad_norm, **times, "useful_s": state["useful_s"]}
    run.journal.metrics({"step": state["step"], "samples": state["samples"], **record})
    text = (
        f"step {state['step']}/{plan.max_steps} loss={loss:.4f} lr={rate:.3e} grad_norm={grad_norm:.3f} "
        f"tokens/s={tokens_per_s:.0f} step_s={times['step_s']:.3f} data_s={times['data_s']:.3f} "
        f"communication_s={times['communication_s']:.3f} mfu={times['mfu']:.3f} "
        f"memory_MiB={times['memory_bytes'] >> 20}"
    )
    told = due(state["step"], plan.log_every_steps) or state["step"] in (1, plan.max_steps)
    run.progress.update(state["step"], text if told else None, f"loss {loss:.3f}, {tokens_per_s:.0f} tokens/s")


def pace(run, slow, recovered):
    """A line and an event for each rank, of (rank, ratio), that has become slow, or is so no longer."""
    step = run.state["step"]
    for name, ranks in (("slow", slow), ("recovered", recovered)):
        for rank, ratio in ranks:
            run.journal.event(name, step=step, rank=rank, host=run.hosts[rank], ratio=round(ratio, 3))
            run.progress.say(run.watch.describe(rank, ratio, step))


def corrupted(run, error):
    """An event for what errors.Corrupted tells of ranks, and the sentence that the run ends with."""
    ranks = [[rank, run.hosts[rank], name] for rank, name in error.tensors.items()]
    run.journal.event("corrupted", step=run.state["step"], ranks=ranks)
    newest = run.saver.newest or "none"
    return f"{error}; nothing is saved, newest checkpoint: {newest}; the same command with --resume goes on"


def interval(run, told):
    """What has been chosen as the interval of checkpoints, if that is new."""
    if told:
        run.journal.event("interval", step=run.state["step"], every_steps=run.interval.every_steps)
        run.progress.say(told)


def scores(run, found):
    """One record and one line of an evaluation."""
    step = run.state["step"]
    run.journal.metrics({"step": step, "samples": run.state["samples"], **found})
    shown = ("loss", "accuracy", "f1", "pearson", run.plan.metric_for_best_model)
    shown = (f"eval_{name}" for name in dict.fromkeys(shown))
    run.progress.say(f"step {step} {' '.join(f'{name}={found[name]:.4f}' for name in shown if name in found)}")


def stopped(run, wish):
    """How a run ended early, which is saved."""
    run.progress.close()
    step = run.state["step"]
    run.journal.event("stop", step=step, why=wish.why)
    again = "delete it, and the" if wish.code == 0 else "the"
    run.progress.say(f"stopped after step {step} of {run.plan.max_steps} ({wish.why}), saved in {run.saver.newest}; "
                     f"{again} same command with --resume goes on")  # fmt: skip


def due(step, every):
    """True after the steps that come `every` so many; 0: never."""
    return every > 0 and step % every == 0

"""Going back: a run (train.Run) whose loss has jumped returns to a checkpoint and leaves out the samples since."""

import contextlib

from . import checkpoint, model, run_folder
from .errors import Diverged, IOFailure
from .mpi import on_root, together


def go_back(run, first):
    """Have `run` go on from the newest checkpoint before step `first`, with the samples after those it has seen.

    Weights, optimizer, step and best metric are those of the checkpoint, which is written again, for the position in
    the data that it has now: so a start with --resume goes the same way. An evaluation that it owes is owed again.
    Raises Diverged, the same on every rank, where there is no such checkpoint, or after train.max_rollbacks.
    Collective.
    """
    state, spikes, output = run.state, run.spikes, run.config.run.output_dir
    for rest in (run.saver.finish, run.saver.settle):  # of one that may not be needed
        with contextlib.suppress(IOFailure):  # which root may meet alone, at the end of either
            rest()
    why = f"step {state['step']}: losses have jumped, or are no numbers, since step {first}"
    if spikes.rollbacks >= run.plan.max_rollbacks:
        raise Diverged(
            f"{why}, and the run has gone back {spikes.rollbacks} times (train.max_rollbacks); newest checkpoint: "
            f"{run.saver.newest or 'none'}"
        ).known_to_all()
    path, known = on_root(run.world.comm, run_folder.go_back, output, first)
    if path is None:
        raise Diverged(f"{why}, and there is no checkpoint of a step before that to go back to").known_to_all()
    with together(run.world.comm):
        run.placed.refill(model.saved(path))
        run.adjust.state.clear()
        checkpoint.load_optimizer(path, run.placed, run.adjust)
    left, seen = state["step"], state["samples"]
    state |= {name: known[name] for name in ("step", "useful_s", "best")} | {"nonfinite": 0}
    state["unmeasured"] = known.get("unmeasured", False)
    run.saver.newest, run.checked = path, None
    spikes.went_back(known.get("spikes"), known["samples"], seen)
    told = {"to": state["step"], "first": first, "left_out": [known["samples"], seen], "rollbacks": spikes.rollbacks}
    run.journal.event("rollback", step=left, **told)
    run.progress.say(
        f"{why}: going back to {path} ({spikes.rollbacks} of {run.plan.max_rollbacks} times) without the "
        f"{seen - known['samples']} samples that came since"
    )
    run.save(waits=not run.config.checkpoint.asynchronous)

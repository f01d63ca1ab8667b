"""What a run (train.Run) has come to: results.json, and the scores and reports of what it has made."""

from pathlib import Path

from . import best, evaluate, files, model
from .errors import IOFailure
from .mpi import choose, on_root, together


def results(run):
    """The results dict, written into the run's folder. Raises stopping.Asked. Collective."""
    config, state, world, training = run.config, run.state, run.world, run.sources.training
    if not run.saver.settle():
        raise IOFailure(
            f"{config.run.output_dir}: the last checkpoint does not read as it was written; once the disk can be "
            f"trusted, go on with --resume; newest checkpoint: {run.saver.newest or 'none'}"
        ).known_to_all()
    if not run.scores:  # of a run that ended between its last checkpoint and its results
        run.measure()
    run.progress.close()
    path = str(run.saver.newest)
    found = {"step": state["step"], "samples": state["samples"], "checkpoint": path, **run.scores}
    if state.get("best"):
        found |= best.results(state, config)
    if training.stream.labelled:
        if found["checkpoint"] != path:
            if run.survival:
                run.survival.at_step = False
            with together(world.comm):
                run.placed.refill(model.saved(found["checkpoint"]))
            run.scores, run.told = {}, None  # were of other weights
        found |= _labelled(run)
    on_root(world.comm, files.write_json, Path(config.run.output_dir) / "results.json", found)
    run.journal.event("communication", choices=choose.made())
    run.journal.event("end", **found)
    return found


def _labelled(run):
    """Evaluate the result on labelled validation and test data, write reports, return the scores."""
    scores, world, folder = dict(run.scores), run.world, run.config.run.output_dir
    for prefix, source in (("eval", run.sources.validation), ("test", run.sources.test)):
        if source:
            found, report = run.scores, run.told
            if prefix == "test" or not found:
                found, report = run.evaluated(source, prefix)
            on_root(world.comm, evaluate.write, folder, prefix, found, report, source.meaning)
            if report:
                run.progress.say(f"{prefix}: {source.stream.folder}\n{report[0]}")
            scores |= world.comm.bcast(found, root=0)
    return scores

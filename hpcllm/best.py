"""Which checkpoint of a run is the best, by a number of its evaluations. Part of the run's state; plain functions.

state["best"] is {"step": that of the best, "value": its number, "evaluations": how many there were since,
"metric" and "data": by what it was told}; None before the first evaluation, and in runs that do not ask.
"""

import math
from pathlib import Path

from .errors import UsageError

# Numbers that are better when they are smaller.
_ERRORS = {"loss", "mse", "rmse", "mae", "perplexity"}


def step(state):
    """Step of the best checkpoint so far, None where there is none."""
    return (state.get("best") or {}).get("step")


def check(plan, metrics):
    """Raise UsageError where evaluations have no such number. metrics: names of those that they have."""
    name = plan.metric_for_best_model.removeprefix("eval_")
    if name not in (known := ["loss", *metrics]):
        raise UsageError(f'train: metric_for_best_model: evaluations have no "{name}", but {", ".join(known)}')


def forget_others(state, plan, data):
    """Drop a best that was told by another number, or on other data, than the run file's now. data: their digest."""
    before = state.get("best")
    if before and (before["metric"], before["data"]) != (plan.metric_for_best_model, data):
        state["best"] = None


def compare(state, plan, scores, data):
    """Whether this step's evaluation is the best so far, which `state` then says.

    plan: the run file's [train]; scores: of the evaluation, on data of the digest `data`. What is no number is worst.
    """
    metric = plan.metric_for_best_model
    if metric is None or not scores:
        return False
    name = metric.removeprefix("eval_")
    value, before = scores[f"eval_{name}"], state.get("best")
    if before is None or not math.isfinite(before["value"]):
        better = before is None or math.isfinite(value)
    else:
        better = value < before["value"] if name in _ERRORS else value > before["value"]
    if better:
        told = {"step": state["step"], "value": value, "evaluations": 0}
        state["best"] = told | {"metric": metric, "data": data}
    else:
        before["evaluations"] += 1
    return better


def hopeless(state, plan):
    """True where so many evaluations have not been better that the run is to end early."""
    patience = plan.early_stopping_patience
    return bool(patience) and bool(state.get("best")) and state["best"]["evaluations"] >= patience


def results(state, config):
    """What the run's results say of it."""
    best = state["best"]
    return {
        "best_step": best["step"],
        "best_value": best["value"],
        "checkpoint": str(Path(config.run.output_dir) / f"checkpoint-{best['step']}"),
        "stopped_early": state["step"] < config.train.max_steps,
    }

"""The best checkpoint: by the number asked for, on the data it was asked on; what is no number is worst."""

from types import SimpleNamespace

import pytest

from hpcllm import best
from hpcllm.errors import UsageError

NAN = float("nan")


def plan(metric="f1", patience=0):
    return SimpleNamespace(metric_for_best_model=metric, early_stopping_patience=patience, max_steps=100)


@pytest.mark.parametrize(
    ("metric", "values", "wanted"),
    [
        ("f1", [0.1, 0.3, 0.3, 0.2], 2),
        ("eval_loss", [0.5, 0.4, NAN, 0.6], 2),
        ("loss", [NAN, NAN, 0.9, 1.0], 3),
        ("accuracy", [NAN, NAN], 1),
    ],
)
def test_the_best_is_the_first_of_the_best_numbers(metric, values, wanted):
    state = {}
    for step, value in enumerate(values, 1):
        state["step"] = step
        better = best.compare(state, plan(metric), {f"eval_{metric.removeprefix('eval_')}": value}, "data")
        assert better == (best.step(state) == step)
    assert best.step(state) == wanted and state["best"]["evaluations"] == len(values) - wanted


def test_a_run_ends_after_so_many_evaluations_without_a_better_one():
    state, seen = {}, []
    for step, value in enumerate([0.3, 0.2, 0.4, 0.1, 0.2, 0.3], 1):
        state["step"] = step
        best.compare(state, plan(), {"eval_f1": value}, "data")
        seen.append(best.hopeless(state, plan(patience=2)))
    assert seen == [False, False, False, False, True, True] and not best.hopeless(state, plan())


def test_another_number_or_other_data_begin_anew():
    for now, data, kept in ((plan(), "data", True), (plan("loss"), "data", False), (plan(), "other", False)):
        state = {"step": 1}
        best.compare(state, plan(), {"eval_f1": 0.5}, "data")
        best.forget_others(state, now, data)
        assert (best.step(state) == 1) == kept


def test_a_number_that_evaluations_lack_is_refused():
    best.check(plan("eval_f1"), ["f1"])
    best.check(plan("loss"), [])
    with pytest.raises(UsageError, match='evaluations have no "F1", but loss, f1'):
        best.check(plan("F1"), ["f1"])

"""The benchmarks' own programs do what they are measured for. How long they take is not looked at here."""

import json

import pytest

from benchmarks import jobs


def test_the_step_that_is_timed_is_that_of_ddp():
    """`benchmarks.train_step` compares ways to make one step, so the losses agree but for what dropout draws."""
    what, how = ("-m", "benchmarks.step_of"), ("--rows", "1", "--precision", "fp32", "--timed", "3")
    ours = json.loads(jobs.run(2, *what, "hpcllm", *how).stdout.splitlines()[-1])
    theirs = json.loads(jobs.torchrun(2, *what, "ddp", *how).splitlines()[-1])
    assert len(ours["losses"]) == len(theirs["losses"])
    assert ours["losses"][-1] < ours["losses"][0] + 0.05
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=0.05)
    assert ours["bytes"] > 0

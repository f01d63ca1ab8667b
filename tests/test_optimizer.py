"""The optimizer's groups and its learning rate."""

import copy
import itertools

import pytest
import torch

from hpcllm import optimizer
from hpcllm.config import Train


def plan(**changes):
    values = {
        "max_steps": 100, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 8, "learning_rate": 0.5,
        "warmup_steps": 10,
    }  # fmt: skip
    return Train(**{**values, **changes})


def test_the_rate_rises_to_its_peak_and_falls_towards_zero():
    for kind, middle in (("linear", 0.25), ("cosine", 0.25)):
        rates = [optimizer.learning_rate(step, plan(lr_scheduler_type=kind)) for step in range(100)]
        assert rates[0] == pytest.approx(0.05) and rates[9] == rates[10] == 0.5
        assert rates[55] == pytest.approx(middle)
        assert all(a > b for a, b in itertools.pairwise(rates[10:]))
        assert 0 < rates[99] < 0.01
    assert optimizer.learning_rate(99, plan(lr_scheduler_type="constant")) == 0.5
    assert optimizer.learning_rate(0, plan(warmup_steps=0)) == 0.5
    assert optimizer.learning_rate(99, plan(warmup_steps=100)) == 0.5


def test_biases_and_norms_do_not_decay():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    before = copy.deepcopy(net.state_dict())
    adjust = optimizer.build(net, plan(weight_decay=0.1))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adjust.step()
    after = net.state_dict()
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.5 * 0.1))
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_step_is_torchs_own(kind):
    ours, theirs = (torch.nn.Linear(5, 3, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    train = plan(optimizer=kind, weight_decay=0.01, sgd_momentum=0.9)
    reference = (
        torch.optim.SGD(theirs.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
        if kind == "sgd"
        else torch.optim.AdamW(theirs.parameters(), lr=0.5, weight_decay=0.01, fused=False, foreach=False)
    )
    adjust = optimizer.build(ours, train)
    for step in range(3):
        for net, stepper in ((ours, adjust), (theirs, reference)):
            net.weight.grad = torch.linspace(-1, 1, 15).view(3, 5) * (step + 1)
            stepper.step()
    torch.testing.assert_close(ours.weight, theirs.weight)

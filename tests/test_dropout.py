"""Dropout: as many as asked for, none twice the same, the mean kept."""

import pytest
import torch
from torch import nn

from hpcllm import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_elements_are_dropped_as_often_as_asked_for_and_independently(probability, dtype):
    torch.manual_seed(0)
    found = dropout.drop(torch.ones(1001, 999, dtype=dtype), probability)
    zero = (found == 0).double()
    assert zero.mean().item() == pytest.approx(probability, abs=3e-3)
    assert found.double().mean().item() == pytest.approx(1.0, rel=2e-2)
    assert found.unique().numel() == 2
    # Neither neighbours, which come of one draw, nor rows tell of each other.
    flat, variance = zero.flatten() - zero.mean(), zero.var().item()
    for distance in (1, 2, 3, 4, 999):
        assert abs((flat[:-distance] * flat[distance:]).mean().item()) < 5e-3 * variance + 5e-4


def test_gradients_pass_where_values_do():
    torch.manual_seed(0)
    tensor = torch.randn(7, 13, requires_grad=True)
    found = dropout.drop(tensor, 0.3)
    found.sum().backward()
    torch.testing.assert_close(found, tensor.detach() * tensor.grad)
    assert 0 < (tensor.grad == 0).sum() < tensor.numel()


def test_modules_drop_in_training_alone_and_by_the_seed():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.0))
    dropout.quicken(model)
    tensor, told = torch.ones(4, 8), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        told.append(model[0](tensor))
    assert torch.equal(told[0], told[1]) and not torch.equal(told[0], told[2])
    model.eval()
    assert torch.equal(model[0](tensor), tensor)

"""Dropout on CPUs, where torch draws a number for each element at a cost of several products: here one draw makes four.

The numbers come from torch's generator, so that what holds for its dropout holds here: seeds, states, recomputation.
"""

import functools

import torch
from torch import nn

_DRAWN = 1 << 16  # values of a quarter of 64 random bits, so that probabilities are rounded to 1 / 65536


def drop(tensor, probability):
    """`tensor` with elements set to zero with `probability`, which is less than 1, and the others scaled up for it."""
    if probability == 0:
        return tensor
    dropped = round(probability * _DRAWN)
    count = tensor.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)[:count]
    kept = (bits >= dropped - _DRAWN // 2).view(tensor.shape)
    return tensor * kept.to(tensor.dtype).mul_(_DRAWN / (_DRAWN - dropped))


def quicken(model):
    """Have the dropout modules of `model`, on the CPU, use `drop`."""
    for module in model.modules():
        if type(module) is nn.Dropout and 0 < module.p < 1 and not module.inplace:
            module.forward = functools.partial(_forward, module)


def _forward(module, tensor):
    return drop(tensor, module.p) if module.training else tensor

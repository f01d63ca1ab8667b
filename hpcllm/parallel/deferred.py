"""Gradients of matrices, put off: backward computes those of activations, which another rank waits for, and leaves the
products that give the weights' for later (Qi et al. 2023, arXiv 2401.10241, section 2)."""

import contextlib

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Deferred(TorchFunctionMode):
    """In this context, multiplications by a weight keep their weight's gradient for `run`.

    Biases, norms and embeddings, which cost little, have theirs at once, and so have `besides` (list of modules): of an
    output layer the gradients of all logits would have to be kept.
    """

    current = None  # the one whose context this is

    def __init__(self, besides=()):
        super().__init__()
        self._products, self._besides = [], {id(module.weight) for module in besides}

    def __enter__(self):
        Deferred.current = self
        return super().__enter__()

    def __exit__(self, *error):
        Deferred.current = None
        return super().__exit__(*error)

    def __torch_function__(self, func, types, arguments=(), named=None):
        named = named or {}
        if func is functional.linear:
            tensor, weight, bias = (*arguments, *named.values(), None)[:3]
            if self._defers(weight):
                return _Product.apply(tensor, weight, bias, True, self._products)
        elif func is torch.addmm and not named and self._defers(arguments[2]):  # transformers' Conv1D
            return _Product.apply(arguments[1], arguments[2], arguments[0], False, self._products)
        elif func in (torch.Tensor.__matmul__, torch.Tensor.matmul) and self._defers(arguments[1]):
            return _Product.apply(arguments[0], arguments[1], None, False, self._products)
        return func(*arguments, **named)

    def _defers(self, tensor):
        matrix = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad and tensor.dim() == 2
        return matrix and id(tensor) not in self._besides

    @torch.no_grad()
    def run(self):
        """Add the gradients that have been kept to those of their weights."""
        while self._products:
            weight, left, right = self._products.pop()
            gradient = (left.flatten(0, -2).t() @ right.flatten(0, -2)).to(weight.dtype)
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


def contexts():
    """torch.utils.checkpoint's context_fn: what is computed again is computed as it was the first time."""
    return contextlib.nullcontext(), Deferred.current or contextlib.nullcontext()


class _Product(torch.autograd.Function):
    """tensor [..., n] times weight ([m, n] where `transposed`, else [n, m]) plus bias [m] or None."""

    @staticmethod
    def forward(ctx, tensor, weight, bias, transposed, products):
        used, added = weight, bias
        if torch.is_autocast_enabled(tensor.device.type):
            dtype = torch.get_autocast_dtype(tensor.device.type)
            tensor, used, added = (t if t is None else t.to(dtype) for t in (tensor, weight, bias))
        ctx.save_for_backward(tensor, used)
        ctx.weight, ctx.transposed, ctx.products, ctx.biased = weight, transposed, products, bias is not None
        return functional.linear(tensor, used if transposed else used.t(), added)

    @staticmethod
    def backward(ctx, gradient):
        tensor, used = ctx.saved_tensors
        # Without the graph that it comes from, which knows this list: a circle that nobody would free.
        tensor = tensor.detach()
        ctx.products.append((ctx.weight, *((gradient, tensor) if ctx.transposed else (tensor, gradient))))
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.biased else None
        return gradient @ (used if ctx.transposed else used.t()), None, of_bias, None, None

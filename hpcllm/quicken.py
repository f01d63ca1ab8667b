"""Parts of transformers' models that have an equal which is quicker."""

import functools

from torch.nn import functional
from transformers import activations

from . import attention, dropout

# Both write the tanh approximation of GELU (Hendrycks and Gimpel 2016) as seven operations; torch has it as one.
_GELUS = (activations.NewGELUActivation, activations.FastGELUActivation)


def quicken(model, device):
    """Have `model` use them on `device` (torch.device): the same numbers up to rounding, other draws of dropout."""
    for module in model.modules():
        if isinstance(module, _GELUS):
            module.forward = functools.partial(functional.gelu, approximate="tanh")
    if device.type == "cpu":
        dropout.quicken(model)
        attention.quicken(model)

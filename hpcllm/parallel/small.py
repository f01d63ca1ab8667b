"""A small model of the same class as a large one, to try out before the run what no plan of a family says."""

import copy

import torch
import torch.distributed as dist

from ..errors import UsageError


@torch.no_grad()
def refuse_unless_same(model, axis, whole, divided, what, group=None, device=None, section="parallel", plain=1):
    """Raise UsageError, the same on every rank, unless a small model gives divided what it gives whole.

    It is of the class of `model`. section, axis, plain: of the run file, for the sentence, which says to go back to
    `plain`; whole(small), divided(small): its logits, in this order; what: models that do more of that are refused;
    group, device: of the ranks between which it is divided, if it is.
    """
    kind = model.config.model_type
    same = torch.zeros(1, device=device)
    try:
        small = of_class(model).to(device)
        expected = whole(small)
        same += torch.allclose(divided(small), expected, rtol=1e-3, atol=1e-5)
    except Exception as error:
        raise UsageError(f"{section}: {axis}: {kind} cannot be tried in small: {error}").known_to_all() from None
    if group is not None:
        dist.all_reduce(same, dist.ReduceOp.MIN, group=group)
    if not same:
        raise UsageError(f"{section}: {axis}: {kind} does more {what}; set {axis} to {plain}").known_to_all()


def of_class(model):
    """A small model of the class of `model`, the same on all ranks, with transformers' own attention.

    Its vocabulary has 64 words, of which the first may be padding.
    """
    config = copy.deepcopy(model.config)
    small = {"hidden_size": 8 * config.num_attention_heads, "head_dim": 8, "intermediate_size": 64, "vocab_size": 64}
    small |= {"num_hidden_layers": 2, "num_decoder_layers": 2, "use_cache": False, "_attn_implementation": None}
    small |= {"layer_types": (getattr(config, "layer_types", None) or [])[:2] or None}
    small |= {"pad_token_id": getattr(config, "pad_token_id", None) and 0}
    for name, value in small.items():
        if hasattr(config, name):
            setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)(config).eval()

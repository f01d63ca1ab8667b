"""Context parallelism: ranks of an axis hold other parts of each sequence, and only attention looks beyond its own.

The keys and values of all parts meet in each attention, queries stay where they are: Llama 3's way (2024, arXiv
2407.21783, section 3.3.2), which takes any mask, and where queries share keys these are the smaller part. Ring
attention (Liu et al. 2023, arXiv 2310.01889) sends them round instead and never holds them all. PyTorch's (2.13,
torch/distributed/tensor/experimental/_context_parallel/_attention.py) has no way on CPUs: it replaces the flash,
efficient and cuDNN kernels alone, while CPUs run _scaled_dot_product_flash_attention_for_cpu; nor does it take a mask
("attn_bias is not supported yet").

Of 2n chunks of a sequence rank i of n has chunks i and 2n-1-i: under a causal mask a token sees those before it, and so
all ranks have as much to do.

B: sequences, S: tokens of one, n: ranks of the axis, h: heads, d: size of one.
"""

import functools

import torch
import torch.distributed as dist
from transformers import MODEL_MAPPING, AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..errors import UsageError
from . import small
from .regions import all_gather, reduce_scatter


def check(config):
    """Raise UsageError for a configuration of a model whose attention cannot be replaced."""
    kind, known = config.model_type, MODEL_MAPPING.get(type(config), None)
    if config.is_encoder_decoder or not getattr(known, "_supports_attention_backend", False):
        raise UsageError(
            f"parallel: context: the attention of {kind} is not one that transformers lets others replace; set context "
            "to 1"
        )


def chunks(size, index):
    """Which of the 2 `size` chunks of a sequence rank `index` of `size` has."""
    return index, 2 * size - 1 - index


def positions(length, size, index):
    """Where in a sequence of `length` tokens those of rank `index` of `size` stand: int64 [length / size]."""
    rows = torch.arange(length).view(2 * size, -1)
    return torch.cat([rows[chunk] for chunk in chunks(size, index)])


def part(tensor, mesh):
    """[B, S / n] of this rank, of a tensor [B, S]."""
    return tensor[:, _here(tensor, mesh)] if mesh.layout.context > 1 else tensor


def inputs(given, mesh):
    """The model's keyword arguments for this rank's part of the sequences, from those for the whole.

    The mask, [B, S], stays whole, as keys are: 0 where nobody looks. It tells transformers how many keys there are.
    """
    if mesh.layout.context == 1:
        return given
    tokens = given["input_ids"]
    mask = given.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else mask
    places = _here(tokens, mesh).unsqueeze(0)
    return {**given, "input_ids": part(tokens, mesh), "attention_mask": mask, "position_ids": places}


def _here(tokens, mesh):
    return positions(tokens.shape[1], mesh.layout.context, mesh.place["context"]).to(tokens.device)


def share(model, mesh, device):
    """Make `model` take a part of each sequence, as `inputs` gives it. Collective, and so is the model then.

    Raises UsageError, the same on every rank, for a model that does more between tokens than attend. device: where the
    ranks can talk.
    """
    _try_in_small(model, mesh, device)
    _share(model, mesh)


def _share(model, mesh):
    group = mesh["context"]
    name = f"hpcllm_context_{group.group_name}"
    AttentionInterface.register(name, functools.partial(_attention, group))
    AttentionMaskInterface.register(name, functools.partial(_mask, mesh.layout.context, mesh.place["context"]))
    model.set_attn_implementation(name)


def _try_in_small(model, mesh, device):
    """Some families count positions in a way of their own, or mix tokens elsewhere too."""
    tokens = torch.arange(2 * mesh.layout.context, device=device).remainder(15).unsqueeze(0) + 1

    def whole(small):
        return small(input_ids=tokens).logits[:, _here(tokens, mesh)]

    def in_parts(small):
        _share(small, mesh)
        return small(**inputs({"input_ids": tokens}, mesh)).logits

    what = "between its tokens than attend by position"
    small.refuse_unless_same(model, "context", whole, in_parts, what, mesh["context"], device)


def _mask(size, index, *, q_length, kv_length, mask_function, attention_mask=None, **more):
    """As transformers' sdpa_mask, bool [B or 1, 1, S / n, S], True where this rank's queries look; None: everywhere.

    `reach`, of a mask: how many keys, from the first on, each half of the queries looks at.
    """
    if kv_length != q_length * size:
        raise UsageError(f"parallel: context: {q_length} tokens of {size} parts need a mask of all, not of {kv_length}")
    here = positions(kv_length, size, index).to(more["device"])

    def of_places(sample, head, query, key):
        return mask_function(sample, head, here[query], key)

    if attention_mask is not None and attention_mask.all():
        attention_mask = None
    lengths = {"q_length": q_length, "kv_length": kv_length, "attention_mask": attention_mask}
    mask = sdpa_mask(mask_function=of_places, **lengths, **{**more, "allow_is_causal_skip": False})
    if mask is not None:
        numbers = torch.arange(1, kv_length + 1, device=mask.device)
        mask.reach = [max(1, int((half.any(-2) * numbers).max())) for half in mask.chunk(2, -2)]
    return mask


def _attention(group, module, query, key, value, attention_mask, **named):
    """As transformers' sdpa_attention_forward: query [B, h, S / n, d], and of key and value as much."""
    both = _Gather.apply(torch.cat((key, value), -1), group)
    key, value = both.split((key.shape[-1], value.shape[-1]), -1)
    named["is_causal"] = False  # the mask says it all
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, **named)
    # Each half of the queries with the keys that it can see, which for one of them may be few.
    reach = getattr(attention_mask, "reach", [key.shape[-2]] * 2)
    halves = [
        sdpa_attention_forward(module, some, key[:, :, :end], value[:, :, :end], mask[..., :end], **named)[0]
        for some, mask, end in zip(query.chunk(2, -2), attention_mask.chunk(2, -2), reach, strict=True)
    ]
    return torch.cat(halves, 1), None


class _Gather(torch.autograd.Function):
    """[B, h, S / n, d] of each rank of a group to [B, h, S, d], in the order of the sequence, on all of them."""

    @staticmethod
    def forward(ctx, mine, group):
        ctx.group, size = group, dist.get_world_size(group)
        parts = mine.new_empty((size * mine.shape[0], *mine.shape[1:]))
        all_gather(parts, mine.contiguous(), group=group)
        whole = mine.new_empty((*mine.shape[:2], size * mine.shape[2], mine.shape[3]))
        for there, here in _in_order(parts, whole, size):
            here.copy_(there)
        return whole

    @staticmethod
    def backward(ctx, gradient):
        size = dist.get_world_size(ctx.group)
        samples, heads, length, width = gradient.shape
        mine = gradient.new_empty((samples, heads, length // size, width))
        parts = mine.new_empty((size * samples, *mine.shape[1:]))
        for there, here in _in_order(parts, gradient, size):
            there.copy_(here)
        reduce_scatter(mine, parts, group=ctx.group)
        return mine, None


def _in_order(parts, whole, size):
    """(chunk in `parts` [n B, h, S / n, d], rank by rank, the same in `whole` [B, h, S, d]), for all chunks: views."""
    by_place = whole.chunk(2 * size, 2)
    for index, part in enumerate(parts.chunk(size)):
        yield from zip(part.chunk(2, 2), [by_place[chunk] for chunk in chunks(size, index)], strict=True)

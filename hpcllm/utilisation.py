"""Model FLOP/s utilisation (MFU): the share of what processors can multiply that goes into the model.

Counted as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): a weight of a matrix product takes 2
operations a token in forward and 4 in backward, a frozen one 2; a pair of tokens of a sequence, also one that causal
attention leaves out, 4 and 8 for each number of a query. Nothing counts twice because it is computed twice, and nothing
that looks up, normalises or draws. Beyond PaLM: what follows the model's base counts for targets alone, which are all
that reaches it; experts count as often as a token uses them; where attention stays within documents, so do pairs. A
window counts as the whole sequence, linear attention as attention, and attention that no configuration tells the sizes
of as nothing.
"""

import time
from dataclasses import dataclass

import torch
from torch import nn

_TRAINED, _FROZEN = 3, 2  # forward and backward, to the weight and to what enters, or to that alone
_AT_LEAST, _AT_MOST_S, _MEASURED_S = 3, 0.3, 0.05


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a training step for a token, a target and a pair of tokens that attend."""

    token: float
    target: float
    pair: float

    def step(self, tokens, targets, pairs):
        return self.token * tokens + self.target * targets + self.pair * pairs


def count(model):
    """The Operations of `model`, whole, of transformers; its weights may be on the meta device."""
    config, inside, outside = model.config, 0, 0
    base, head = model.base_model, model.get_output_embeddings()
    within = set() if base is model else set(base.modules()) - {head}
    used = (getattr(config, "num_experts_per_tok", None) or 1) / _experts(config)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        products = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        numbers = sum(_passes(p) * p.numel() * (used if p.dim() == 3 else 1) for p in products)  # experts are stacked
        if module in within:
            inside += numbers
        else:
            outside += numbers
    return Operations(2 * inside, 2 * outside, _TRAINED * 2 * _widths(config))


def _passes(parameter):
    return _TRAINED if parameter.requires_grad else _FROZEN


def _widths(config):
    """Numbers of queries and of values of a token, all layers and heads together; 0 for what has no heads."""
    try:
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        of_query = getattr(config, "head_dim", None) or config.hidden_size // heads
        if getattr(config, "qk_nope_head_dim", None):  # multi-head latent attention
            of_query = config.qk_nope_head_dim + config.qk_rope_head_dim
        return layers * heads * (of_query + (getattr(config, "v_head_dim", None) or of_query))
    except (AttributeError, RuntimeError, TypeError):  # other names, or of each layer another number
        return 0


def _experts(config):
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1


def peak(world, precision):
    """(FLOP/s of dense matrix products of all processors of the job, how that is known). Collective.

    precision: as in the run file. GPUs that `plan.machines` knows have what their data sheets say, all else what square
    products reach when all ranks multiply at the same time. Ranks that share a GPU have it once.
    """
    device, machine, processor = world.device, None, world.rank
    if device.type != "cpu":
        from .plan import machines

        gpus = torch.get_device_module(device)
        # Schedulers may show each rank its own GPU under the same number.
        machine, processor = machines.called(gpus.get_device_name(device)), str(gpus.get_device_properties(device).uuid)
    mine = machine.peak(precision) if machine else products(device, precision, torch.get_num_threads())
    rates = dict(world.comm.allgather(((world.host, processor), mine)))
    return sum(rates.values()), f"data sheet of the {machine.name}" if machine else "measured"


def products(device, precision, threads, seconds=_MEASURED_S):
    """FLOP/s of the best of several square matrix products on `device` (torch.device), within about `seconds`.

    precision: "fp32" or "bf16"; threads: that a CPU computes them with.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    side = 8192 if device.type != "cpu" else 512 if threads < 4 else 1024 if threads < 16 else 2048
    small = torch.full((side // 8, side // 8), 0.5, dtype=dtype, device=device)
    multiply(small, small)  # loads the kernels
    # CPUs without bf16 arithmetic take hundreds of times longer.
    while 512 * multiply(small, small) > _AT_MOST_S and side > 64:
        side //= 2
        small = small[: side // 8, : side // 8].contiguous()
    a = torch.full((side, side), 0.5, dtype=dtype, device=device)
    times, end = [], time.monotonic() + seconds
    while len(times) < _AT_LEAST or time.monotonic() < end:
        times.append(multiply(a, a))
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)  # these were not the run's
    return 2 * side**3 / min(times)


def multiply(a, b):
    """Seconds of one matrix product, whole."""
    start = time.perf_counter()
    torch.matmul(a, b)
    if not a.is_cpu:
        torch.get_device_module(a.device).synchronize(a.device)
    return time.perf_counter() - start

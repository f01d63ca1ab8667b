"""A plain loop with FSDP2 (fully_shard): a tiny Llama learns Python's own docstrings, byte by byte.

    mpirun -np 2 python examples/fsdp2.py runs/fsdp2

The two lines marked "added" are all that a script needs which ran under torchrun.
"""

import inspect
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import hpcllm.mpi  # added

hpcllm.mpi.init()  # added: torch.distributed runs over MPI from here on

if not dist.is_initialized():
    dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")

text = "\n".join(filter(None, map(inspect.getdoc, vars(str).values()))).encode()
samples = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
model = LlamaForCausalLM(config).to(device)
mesh = init_device_mesh(device.type, (size,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))

for step in range(6):
    batch = samples[order[16 * step : 16 * (step + 1)][rank::size]].to(device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / size
    dist.all_reduce(mean)
    if rank == 0:
        print(f"step {step} loss {mean.item():.6f}", flush=True)

weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    model.save_pretrained(sys.argv[1], state_dict=weights)
dist.barrier()

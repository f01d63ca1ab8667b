"""A plain loop with DistributedDataParallel: a tiny Llama learns Python's own docstrings, byte by byte.

    mpirun -np 2 python examples/ddp.py runs/ddp

The two lines marked "added" are all that a script needs which ran under torchrun.
"""

import inspect
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import hpcllm.mpi  # added

hpcllm.mpi.init()  # added: torch.distributed runs over MPI from here on

if not dist.is_initialized():
    dist.init_process_group("gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")

text = "\n".join(filter(None, map(inspect.getdoc, vars(str).values()))).encode()
samples = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
model = DistributedDataParallel(LlamaForCausalLM(config).to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
loader = DataLoader(samples, batch_size=16 // dist.get_world_size(), sampler=DistributedSampler(samples))

for step, batch in enumerate(loader):
    if step == 6:
        break
    batch = batch.to(device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        print(f"step {step} loss {mean.item():.6f}", flush=True)

if dist.get_rank() == 0:
    model.module.save_pretrained(sys.argv[1])
dist.barrier()

"""A loop with Hugging Face's Accelerate: a tiny Llama learns Python's own docstrings, byte by byte.

    mpirun -np 2 python examples/accelerate_loop.py runs/accelerate

The two lines marked "added" are all that a script needs which ran on one process or under `accelerate launch`.
"""

import inspect
import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import hpcllm.mpi  # added

hpcllm.mpi.init()  # added: before Accelerator, which looks for a process group

text = "\n".join(filter(None, map(inspect.getdoc, vars(str).values()))).encode()
samples = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)

# The seedable sampler draws the same order whatever the number of processes.
accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
loader = DataLoader(samples, batch_size=16 // accelerator.num_processes, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for step, batch in enumerate(loader):
    if step == 6:
        break
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step} loss {accelerator.gather(loss.detach()).mean():.6f}")

accelerator.unwrap_model(model).save_pretrained(sys.argv[1], is_main_process=accelerator.is_main_process)
accelerator.wait_for_everyone()

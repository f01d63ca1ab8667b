"""Hugging Face's Trainer: a tiny Llama learns Python's own docstrings, byte by byte.

    mpirun -np 2 python examples/trainer.py runs/trainer

The two lines marked "added" are all that a script needs which ran on one process or under torchrun.
"""

import inspect
import os
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import hpcllm.mpi  # added

hpcllm.mpi.init()  # added: before TrainingArguments, which looks for a process group

text = "\n".join(filter(None, map(inspect.getdoc, vars(str).values()))).encode()
samples = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)

set_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
trainer = Trainer(
    model=LlamaForCausalLM(config),
    args=TrainingArguments(
        output_dir=sys.argv[1],
        per_device_train_batch_size=16 // int(os.environ.get("WORLD_SIZE", 1)),
        max_steps=6,
        optim="sgd",
        learning_rate=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=[{"input_ids": sample, "labels": sample} for sample in samples],
)
trainer.train()
trainer.save_model()

"""Does speed cost quality? Loss curves of hpcllm's fast path and of a plain fp32 loop with padding, DDP and Gloo.

    python -m benchmarks.loss_curves [--input wiki.valid.txt wiki.test.txt] [--task masked_lm causal_lm] [--plot FILE]

fast: `hpcllm train`, bf16, ranks of a host with one copy of the weights, rows full of documents that do not see each
other. plain: a document, or piece of one, a row, padded; fp32; DistributedDataParallel over Gloo under torchrun; so
many rows a step that as many of their tokens are no padding as a step of the other has. The same small BERT and GPT-2
with dropout, AdamW with clipped gradients, linear warm-up and decay, and the same documents. Every seed draws weights,
order, masks and dropout anew; ways take turns. Told of each: the mean training loss of the last 20 steps, and the
difference between the mean curves beside what seeds of one way differ by.
"""

import argparse
import json
import statistics
import sys
import tempfile

import numpy as np

from . import jobs
from .masked_lm_speed import documents, pieces

LENGTH, ROWS, RANKS, RATE, WARM_UP, LAST = 128, 16, 2, 1e-3, 20, 20
WORDS = 4000
KINDS = {
    "masked_lm": {
        "model_type": "bert",
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "intermediate_size": 768,
        "max_position_embeddings": LENGTH,
    },
    "causal_lm": {"model_type": "gpt2", "n_embd": 192, "n_layer": 3, "n_head": 6, "n_positions": LENGTH},
}


def fast(folder, task, steps, seed):
    """Training losses of the steps."""
    records = jobs.train(
        RANKS,
        folder,
        run={"seed": seed},
        data={"train": f"{folder}/data/train", "attention": "document"},
        model={"task": task, "config": KINDS[task]},
        train={
            "max_steps": steps,
            "global_batch_size": ROWS,
            "micro_batch_size": ROWS // RANKS,
            "sequence_length": LENGTH,
            "learning_rate": RATE,
            "warmup_steps": WARM_UP,
            "precision": "bf16",
            "device": "cpu",
        },
    )
    return [record["loss"] for record in records if "loss" in record]


def plain(folder, task, steps, seed):
    told = jobs.torchrun(RANKS, "-m", "benchmarks.loss_curves", "--child", folder, task, steps, seed)
    return json.loads(next(line for line in told.splitlines() if line.startswith("[")))


def train_plain(folder, task, steps, seed):
    """What each rank of `plain` runs."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, DataCollatorForLanguageModeling

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, masked = dist.get_rank(), task == "masked_lm"
    words, rows = pieces(folder, LENGTH, special=masked)
    width = round(ROWS * LENGTH / statistics.mean(map(len, rows)) / RANKS) * RANKS
    torch.manual_seed(seed)
    made = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    ends = {"bos_token_id": None, "eos_token_id": None} if not masked else {}
    config = AutoConfig.for_model(**KINDS[task], vocab_size=len(words), pad_token_id=words.pad_token_id, **ends)
    net = DistributedDataParallel(made.from_config(config)).train()
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    adjust = torch.optim.AdamW(groups, lr=RATE)
    rise = [min(1.0, (step + 1) / WARM_UP) * min(1.0, (steps - step) / (steps - WARM_UP)) for step in range(steps + 1)]
    rates = torch.optim.lr_scheduler.LambdaLR(adjust, rise.__getitem__)
    collate = DataCollatorForLanguageModeling(words, mlm=masked, mlm_probability=0.15)
    draw, losses, order = np.random.default_rng(seed), [], []
    torch.manual_seed(seed * 1000 + rank)
    for _ in range(steps):
        if len(order) < width:
            order = draw.permutation(len(rows)).tolist()
        step, order = order[:width], order[width:]
        mine = [words.pad({"input_ids": rows[i]}, padding="max_length", max_length=LENGTH) for i in step[rank::RANKS]]
        batch = collate(mine)
        loss = net(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adjust.step()
        adjust.zero_grad()
        rates.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / RANKS)
    if rank == 0:
        print(json.dumps(losses), flush=True)
    jobs.end_gloo()


def smooth(losses, width=LAST):
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def tell(task, found):
    print(f"\n| {task} | loss of the last {LAST} steps, by seed | mean | largest less smallest |\n|---|---|---:|---:|")
    ends = {way: [float(np.mean(run[-LAST:])) for run in runs] for way, runs in found.items()}
    for way, values in ends.items():
        by_seed = ", ".join(f"{value:.4f}" for value in values)
        print(f"| {way} | {by_seed} | {statistics.mean(values):.4f} | {max(values) - min(values):.4f} |")
    curves = {way: np.array([smooth(run) for run in runs]) for way, runs in found.items()}
    apart = curves["fast"].mean(0) - curves["plain"].mean(0)
    spread = max(np.ptp(of_way, axis=0).mean() for of_way in curves.values())
    fast_end, plain_end = (statistics.mean(ends[way]) for way in ("fast", "plain"))
    print(f"\ndifference of the means at the end: {fast_end - plain_end:+.4f}; "
          f"of the mean curves ({LAST} steps each): {apart.mean():+.4f} on average, largest {np.abs(apart).max():.4f}; "
          f"seeds of a way differ by {spread:.4f} on average", flush=True)  # fmt: skip


def plot(file, found):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4), squeeze=False)
    for axis, (task, ways) in zip(axes[0], found.items(), strict=True):
        for way, runs in ways.items():
            curves = np.array([smooth(run) for run in runs])
            steps = np.arange(curves.shape[1]) + LAST
            (line,) = axis.plot(steps, curves.mean(0), label=f"{way}, mean of {len(runs)} seeds")
            axis.fill_between(steps, curves.min(0), curves.max(0), alpha=0.25, color=line.get_color(), linewidth=0)
        axis.set(title=task, xlabel="step", ylabel=f"training loss, mean of {LAST} steps (nats)")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", help="texts with headings; made up if left out")
    parser.add_argument("--task", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", metavar="FILE", help="needs matplotlib")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return train_plain(args.child[0], args.child[1], *map(int, args.child[2:]))
    print(f"{args.steps} steps of {ROWS * LENGTH} tokens, {RANKS} ranks, {args.seeds} seeds; {jobs.versions()}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        from .masked_lm_speed import prepare

        prepare(folder, documents(args.input), WORDS)
        for task in args.task:
            found[task] = {"fast": [], "plain": []}
            for seed in range(1, args.seeds + 1):
                found[task]["fast"].append(fast(folder, task, args.steps, seed))
                found[task]["plain"].append(plain(folder, task, args.steps, seed))
                print(f"{task}, seed {seed}: done", file=sys.stderr, flush=True)
            tell(task, found[task])
    if args.plot:
        plot(args.plot, found)


if __name__ == "__main__":
    main()

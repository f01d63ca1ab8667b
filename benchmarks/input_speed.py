"""How fast do samples come from the disk to a batch? hpcllm's shards beside memmap, MDS, Arrow and plain HDF5 slices.

    python -m benchmarks.input_speed [--megatokens 64] [--rounds 5] [--folder DIR]

First a training step of a GPT-2 of 27 M parameters (4 x 256 tokens) with samples from the shards, read a step ahead by
`hpcllm.data.batches.ahead`, beside the same step on one batch that is always there, in turns. Then a file that the page
cache does not hold: a sample of each of its blocks (which are read and checked whole), and all samples, in random
order, beside `dd bs=1M` of the same file, in turns.

Then random batches of 32 samples of 1024 tokens as int64 tensors, from files of the same tokens that the page cache
holds, in one thread. Peers read a sample at a time: in a bare loop with torch.stack, and by torch's DataLoader, as
their users do. All take turns in every round; microseconds a sample, medians over rounds (smallest to largest). MDS is
that of mosaicml-streaming, Arrow that of datasets (benchmarks/requirements.txt); what is not installed is left out.
"""

import argparse
import importlib.machinery
import itertools
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hpcllm.data import batches, order, shards
from hpcllm.files import write_at
from hpcllm.tasks import causal_lm

from . import jobs

LENGTH, ROWS, VOCABULARY = 1024, 32, 16384


def write(folder, tokens):
    """The tokens as one shard with documents of 500."""
    path = folder / shards.name(0)
    borders = np.append(np.arange(0, len(tokens), 500), len(tokens))
    known = {"vocab_size": VOCABULARY, "separator_id": 0, "tokenizer_hash": "0" * 64}
    offsets = shards.create(path, token_count=len(tokens), document_count=len(borders) - 1, **known)
    with open(path, "r+b") as file:
        write_at(file.fileno(), tokens, offsets["tokens"])
        write_at(file.fileno(), borders, offsets["document_offsets"])
    blocks = -(-tokens.nbytes // shards.BLOCK_BYTES)
    crcs, highest = shards.scan(path, offsets["tokens"], tokens.dtype, len(tokens), 0, blocks)
    shards.write_manifest(folder, [shards.finish(path, crcs, highest)], **known)


# --- readers -----------------------------------------------------------------------------------------------------


class Samples(Dataset):
    """`read(i)` -> a sample as NumPy array."""

    def __init__(self, count, read):
        self._count, self._read = count, read

    def __len__(self):
        return self._count

    def __getitem__(self, i):
        return torch.from_numpy(self._read(i).astype(np.int64))


def memmap(folder, tokens):
    tokens.tofile(folder / "tokens.bin")
    mapped = np.memmap(folder / "tokens.bin", tokens.dtype, "r")
    return lambda i: mapped[i * LENGTH : (i + 1) * LENGTH]


def plain_hdf5(folder, tokens):
    import h5py

    with h5py.File(folder / "plain.h5", "w") as file:
        file["tokens"] = tokens
    data = h5py.File(folder / "plain.h5", "r")["tokens"]
    return lambda i: data[i * LENGTH : (i + 1) * LENGTH]


def arrow(folder, tokens):
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({"tokens": tokens.reshape(-1, LENGTH)})
    made.save_to_disk(str(folder / "arrow"))
    found = datasets.load_from_disk(str(folder / "arrow")).with_format("numpy")
    return lambda i: found[i]["tokens"]


def mds(folder, tokens):
    for name in ("", ".transforms", ".transforms.functional", ".datasets"):
        # What streaming imports for pictures, of which there are none here, and which does not go with every torch.
        module = types.ModuleType(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        module.to_tensor, module.VisionDataset = None, object
        sys.modules.setdefault(module.__name__, module)
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    with MDSWriter(out=str(folder / "mds"), columns={"tokens": f"ndarray:uint16:{LENGTH}"}) as writer:
        for sample in tokens.reshape(-1, LENGTH):
            writer.write({"tokens": sample})
    clean_stale_shared_memory()
    found = StreamingDataset(local=str(folder / "mds"), batch_size=ROWS)
    return lambda i: found[i]["tokens"]


PEERS = {"memmap": memmap, "HDF5 slices": plain_hdf5, "Arrow": arrow, "MDS": mds}


def all_readers(folder, tokens):
    """{name: function of sample numbers, int64 [batches, rows], that yields a tensor [rows, tokens] for each batch}."""
    stream = shards.open_folder(str(folder))

    def ours(rows):
        return (torch.from_numpy(stream.gather(row * LENGTH, LENGTH)) for row in rows)

    def looped(data, rows):
        return (torch.stack([data[i] for i in row.tolist()]) for row in rows)

    def loaded(data, rows):
        return DataLoader(data, batch_sampler=rows.tolist())

    readers = {"hpcllm": ours}
    for name, make in PEERS.items():
        try:
            data = Samples(len(tokens) // LENGTH, make(folder, tokens))
        except ImportError as error:
            print(f"{name} left out: {error}", file=sys.stderr)
            continue
        readers[name] = lambda rows, data=data: looped(data, rows)
        readers[f"{name}, DataLoader"] = lambda rows, data=data: loaded(data, rows)
    return readers


def warm(folder, tokens, rounds, steps=100):
    print("\n| way | microseconds a sample | to hpcllm's |\n|---|---:|---:|")
    readers, draw = all_readers(folder, tokens), np.random.default_rng(0)
    found, count = {name: [] for name in readers}, len(tokens) // LENGTH
    for turn in range(rounds + 1):
        rows = draw.integers(0, count, (steps, ROWS))
        sums = set()
        for name, read in readers.items():
            if not turn:  # nor is it timed what is checked or loaded once
                sums.add(sum(int(batch.sum()) for batch in read(rows)))
                continue
            began = time.perf_counter()
            for _ in read(rows):
                pass
            found[name].append(1e6 * (time.perf_counter() - began) / rows.size)
        assert len(sums) < 2, "readers give different tokens"
    for name, values in found.items():
        ratios = [theirs / ours for theirs, ours in zip(values, found["hpcllm"], strict=True)]
        if name != "hpcllm":
            jobs.record(f"random samples of {LENGTH} tokens: {name}", ratios)
        print(f"| {name} | {jobs.spread(values, '{:.2f}')} | {jobs.spread(ratios, '{:.1f}')} |", flush=True)


# --- in training -------------------------------------------------------------------------------------------------


def training(folder, rounds, warm_up=4):
    """Steps of `benchmarks.step_of` with batches from the shards and with one that is always there."""
    from . import step_of

    torch.set_num_threads(1)
    arguments = argparse.Namespace(rows=4, precision="bf16", sharding="auto", timed=rounds)
    *_, step, _ = step_of.hpcllm(arguments)
    source = batches.Source(shards.open_folder(str(folder)), causal_lm, None, 256, 0.15, 0)
    plan = argparse.Namespace(global_batch_size=4, micro_batch_size=4)
    coming = batches.ahead(lambda at: source.training_step(at, 0, 1, plan), itertools.count(0, 4))
    always = source.training_step(0, 0, 1, plan)
    taken = {"shards": [], "synthetic": []}
    for turn in range(warm_up + rounds):
        for way in ("shards", "synthetic") if turn % 2 else ("synthetic", "shards"):
            began = time.perf_counter()
            step(0, next(coming) if way == "shards" else always)
            if turn >= warm_up:
                taken[way].append(time.perf_counter() - began)
    coming.close()
    real, synthetic = (1e3 * np.array(taken[way]) for way in taken)
    print(f"{rounds} steps each in turns: with shards {np.median(real):.1f} ms, synthetic {np.median(synthetic):.1f} "
          f"ms (medians); ratio {np.median(real) / np.median(synthetic):.4f}, of the best {real.min():.1f} and "
          f"{synthetic.min():.1f} ms {real.min() / synthetic.min():.4f}", flush=True)  # fmt: skip


# --- a cold file -------------------------------------------------------------------------------------------------


def forget(path):
    """Out of the page cache with a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(folder, tokens, rounds):
    path = folder / shards.name(0)
    size, rates = path.stat().st_size, {"each block once": [], "all samples": [], "dd": []}
    for turn in range(rounds):
        forget(path)
        began = time.perf_counter()
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M"], check=True, stderr=subprocess.DEVNULL)
        rates["dd"].append(size / (time.perf_counter() - began))
        for way, stride in (("each block once", shards.BLOCK_BYTES // tokens.itemsize), ("all samples", LENGTH)):
            forget(path)
            stream = shards.open_folder(str(folder))
            count = (len(tokens) - LENGTH) // stride
            samples, _ = order.samples(0, count, count, turn)
            began = time.perf_counter()
            for at in range(0, count, ROWS):
                stream.gather(samples[at : at + ROWS] * stride, LENGTH)
            rates[way].append(size / (time.perf_counter() - began))
            stream.close()
    print(f"\n| cold file of {size / 1e6:.0f} MB, random order | MB/s | to dd's |\n|---|---:|---:|")
    for way, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(values, rates["dd"], strict=True)]
        print(f"| {way} | {jobs.spread([1e-6 * value for value in values], '{:.0f}')} | {jobs.spread(ratios)} |")
        if way != "dd":
            jobs.record(f"cold file, {way}: dd", ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megatokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="training steps each way")
    parser.add_argument("--folder", help="where the files are made and removed again (default: the temporary folder)")
    args = parser.parse_args()
    print(f"{args.megatokens} M tokens, {args.rounds} rounds; {jobs.versions()}\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, count = Path(name), args.megatokens * 1_000_000 // LENGTH * LENGTH
        tokens = np.random.default_rng(0).integers(1, VOCABULARY, count, dtype=np.uint16)
        write(folder, tokens)
        training(folder, args.steps)
        cold(folder, tokens, args.rounds)
        warm(folder, tokens, args.rounds)  # last, for what `mds` hides from whoever imports later


if __name__ == "__main__":
    main()

"""How well does `hpcllm plan` predict what others have published? Predicted beside published; needs no MPI, no GPU.

    python -m benchmarks.plan [--fit]

The ten rows of table 1 of Narayanan et al. 2021 (arXiv 2104.04473), with the micro-batch sizes and interleaving of
Megatron-LM's examples/sc21/run_table_1.sh; then rows by others, with other programs, that had no part in the fit. A row
is a formula of the model as that program runs it: GPT in fp16 with fused kernels keeps s b h (34 + 5 a s / h) bytes a
layer (Korthikanti et al. 2022, arXiv 2205.05198). --fit: the constants anew, on all ten rows and on each nine of them.
"""

import argparse
import dataclasses
import itertools
from dataclasses import dataclass

from hpcllm.parallel.mesh import Layout
from hpcllm.plan import cost, machines
from hpcllm.plan.cost import Work
from hpcllm.plan.shapes import Part, Shapes

PASSES = 2.25
"""How often fused kernels move a byte that forward keeps: written, read, and part of a time more. Fitted."""


@dataclass(frozen=True)
class Row:
    """A published run. published: what `unit` says."""

    name: str
    shapes: object
    machine: object
    work: Work
    published: float
    unit: str = "TFLOP/s a GPU"


def gpt(hidden, layers, heads, tokens, vocabulary, tensor=1, flash=False, passes=PASSES):
    """Shapes of GPT in fp16, by formula. flash: attention without its matrix."""
    token = tokens * hidden
    attention = 0 if flash else 5 * heads * tokens**2
    block = Part(
        parameters=12 * hidden**2 + 13 * hidden,
        cut=12 * hidden**2 + 7 * hidden,
        flops=24 * tokens * hidden**2 + 4 * tokens**2 * hidden,
        traffic=passes * 10 * token,
        traffic_cut=passes * (24 * token + attention),
        saved=10 * token,
        saved_cut=24 * token + attention,
        entering=2 * token,
        sums=4 * token,
        sums_back=4 * token,
        meetings=4,
        calls=20,
    )
    words = vocabulary * hidden
    first = Part(parameters=words + token, cut=words, sums=2 * token, meetings=1, calls=4)
    last = Part(parameters=words + 2 * hidden, cut=words, flops=2 * token * vocabulary, sums_back=2 * token, meetings=1)
    # Ranks of a node send a part of a stage's output each (arXiv 2104.04473, 4.1).
    return Shapes(first, (block,) * layers, last, words, tokens * vocabulary, 2 * token / tensor, tokens)


def llama(hidden, feed, layers, heads, groups, tokens, vocabulary):
    """Shapes of Llama in bf16, by formula: what autograd keeps of one block, fused norms and flash attention."""
    key = hidden * groups / heads
    matrices = 2 * hidden**2 + 2 * hidden * key + 3 * hidden * feed
    saved = 2 * tokens * (2 * hidden + hidden + 2 * key + 2 * hidden + 2 * hidden + 4 * feed)
    block = Part(
        parameters=matrices + 2 * hidden,
        cut=matrices,
        flops=2 * tokens * matrices + 4 * tokens**2 * hidden,
        traffic=PASSES * saved,
        saved=saved,
        entering=2 * tokens * hidden,
        copies=2 * matrices,
        calls=40,
    )
    words = vocabulary * hidden
    last = Part(parameters=words, cut=words, flops=2 * tokens * words, copies=2 * words)
    return Shapes(Part(words, words), (block,) * layers, last, 0, tokens * vocabulary, 2 * tokens * hidden, tokens)


def megatron(name, hidden, layers, heads, tensor, pipeline, gpus, batch, micro, published, stages=1):
    data = gpus // tensor // pipeline
    work = Work(
        Layout(data, 1, pipeline, 1, tensor),
        node=8,
        micro_batch=micro,
        micro_batches=batch // data // micro,
        checkpointing=True,
        schedule="interleaved" if stages > 1 else "1f1b",
        stages_per_rank=stages,
        weight=2,
        gradient=2,
        state=12,
        travelling=2,
        balanced=False,
    )
    return lambda passes: Row(
        name, gpt(hidden, layers, heads, 2048, 51200, tensor, passes=passes), machines.find("a100"), work, published
    )


# Parameters, hidden, layers, heads, tensor, pipeline, GPUs, batch, micro-batch, TFLOP/s, stages a rank.
TABLE_1 = [
    megatron("1.7B", 2304, 24, 24, 1, 1, 32, 512, 16, 137),
    megatron("3.6B", 3072, 30, 32, 2, 1, 64, 512, 16, 138),
    megatron("7.5B", 4096, 36, 32, 4, 1, 128, 512, 16, 142),
    megatron("18.4B", 6144, 40, 48, 8, 1, 256, 1024, 8, 135),
    megatron("39.1B", 8192, 48, 64, 8, 2, 512, 1536, 4, 138),
    megatron("76.1B", 10240, 60, 80, 8, 4, 1024, 1792, 2, 140, 3),
    megatron("145.6B", 12288, 80, 96, 8, 8, 1536, 2304, 2, 148, 2),
    megatron("310.1B", 16384, 96, 128, 8, 16, 1920, 2160, 1, 155, 2),
    megatron("529.6B", 20480, 105, 128, 8, 35, 2520, 2520, 1, 163, 3),
    megatron("1008.0B", 25600, 128, 160, 8, 64, 3072, 3072, 1, 163),
]


def alone(gpus, micro, batch, sharding="none", weight=2, travelling=2):
    """Work of data parallelism alone on nodes of 8."""
    layout = Layout(1, gpus, 1, 1, 1) if sharding != "none" else Layout(gpus, 1, 1, 1, 1)
    return Work(layout, 8, micro, batch // gpus // micro, sharding, weight=weight, travelling=travelling)


def others():
    """Rows that had no part in the fit: other programs, kernels and GPUs."""
    a100, h100 = machines.find("a100"), machines.find("h100")
    yield megatron("GPT-3 175B, Megatron-LM's README", 12288, 96, 96, 8, 16, 1024, 1536, 1, 138)(PASSES)
    # Micro-batches and sharding of training/configs/experiment/pile at 80 GB.
    flash = (
        ("125M", 768, 12, 12, 32, 256, "none", 1310), ("355M", 1024, 24, 16, 16, 256, "none", 503),
        ("760M", 1536, 24, 16, 16, 256, "none", 245), ("1.3B", 2048, 24, 16, 8, 512, "optimizer", 169),
        ("2.7B", 2560, 32, 20, 4, 512, "optimizer", 85),
    )  # fmt: skip
    for name, hidden, layers, heads, micro, batch, sharding, published in flash:
        shapes = gpt(hidden, layers, heads, 2048, 50264, flash=True)
        work = alone(8, micro, batch, sharding, weight=4, travelling=4)
        yield Row(f"GPT3-{name}, flash-attention, 8 x A100", shapes, a100, work, published, "k tokens/s")
    # 32000 steps of 2^20 tokens in 24 h (llm.c, discussion 677).
    shapes = gpt(1600, 48, 25, 1024, 50304, flash=True)
    work = alone(8, 16, 1024, "optimizer")
    yield Row("GPT-2 1558M, llm.c, 8 x H100", shapes, h100, work, 32000 * 2**20 / 86400 / 1e3, "k tokens/s")


def unsure():
    """Rows that lack facts: how much of forward is computed again, and the peak at 500 W, which is between those of the
    SXM and NVL boards (torchtitan's benchmarks/llama3_h100_202412_torchtitan.md). Both ends are predicted."""
    sxm = dataclasses.replace(machines.find("h100"), memory_bandwidth=2.4e12)
    nvl = dataclasses.replace(sxm, bf16=835e12)
    model = llama(4096, 14336, 32, 32, 8, 8192, 128256)
    for gpus, published in ((8, 6667), (128, 6514)):
        for machine, again in ((sxm, False), (nvl, True)):
            work = dataclasses.replace(alone(gpus, 2, 2 * gpus, "full", 4, 2), checkpointing=again)
            name = f"Llama-3.1-8B, torchtitan, {gpus} x H100, {'all' if again else 'nothing'} again"
            yield Row(name, model, machine, work, published, "tokens/s a GPU")


def predict(row):
    """What the row's unit counts, as the cost model predicts it."""
    spent, _ = cost.time(row.shapes, row.machine, row.work)
    made, work = row.work.layout, row.work
    sequences = made.data * work.micro_batch * work.micro_batches
    if row.unit == "k tokens/s":
        return sequences * row.shapes.tokens / spent.step / 1e3
    if row.unit == "tokens/s a GPU":
        return sequences * row.shapes.tokens / spent.step / made.size
    # As the paper counts: blocks forward, backward and forward again, the output layer without the last.
    done = 4 * sum(block.flops for block in row.shapes.blocks) + 3 * row.shapes.last.flops
    return sequences * done / spent.step / made.size / 1e12


def error(row):
    return predict(row) / row.published - 1


def table(rows):
    """Lines of Markdown, and the mean of the errors' sizes."""
    lines = ["| run | layout | micro-batch x number | published | predicted | error |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        work = row.work
        how = work.layout.describe() + (f", {work.stages_per_rank} stages a rank" if work.stages_per_rank > 1 else "")
        how += f", sharding {work.sharding}" * (work.layout.shard > 1)
        lines.append(
            f"| {row.name} | {how} | {work.micro_batch} x {work.micro_batches} | {row.published:,.0f} {row.unit} | "
            f"{predict(row):,.0f} | {error(row):+.1%} |"
        )
    return lines, sum(abs(error(row)) for row in rows) / len(rows)


def where(rows):
    """Lines of Markdown: parts of the predicted step."""
    names = [field.name for field in dataclasses.fields(cost.Time)]
    lines = [f"| run | step | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for row in rows:
        spent, _ = cost.time(row.shapes, row.machine, row.work)
        parts = " | ".join(f"{seconds / spent.step:.0%}" for seconds in dataclasses.astuple(spent))
        lines.append(f"| {row.name} | {spent.step:.3g} s | {parts} |")
    return lines


def tried():
    """{(products, LINK, PASSES): errors of the ten rows} for a grid of constants."""
    found, link = {}, cost.LINK
    shares, links = [one / 50 for one in range(30, 49)], [one / 20 for one in range(6, 19)]
    for passes in [one / 4 for one in range(4, 17)]:
        rows = [make(passes) for make in TABLE_1]
        for products, cost.LINK in itertools.product(shares, links):
            machine = dataclasses.replace(machines.find("a100"), products=products)
            found[products, cost.LINK, passes] = [error(dataclasses.replace(row, machine=machine)) for row in rows]
    cost.LINK = link
    return found


def fit():
    """Print the best constants for all ten rows, and for each nine of them with the error of the tenth."""
    found = tried()

    def best(numbers):
        return min(found, key=lambda constants: sum(abs(found[constants][number]) for number in numbers))

    everything = best(range(len(TABLE_1)))
    print("\n## The fit: products (A100), LINK, PASSES\n")
    print(f"All ten rows: {everything}, mean error {sum(map(abs, found[everything])) / len(TABLE_1):.1%}.\n")
    print("| without | constants | error of that row |\n|---|---|---:|")
    left_out = []
    for number, make in enumerate(TABLE_1):
        constants = best(set(range(len(TABLE_1))) - {number})
        left_out.append(found[constants][number])
        print(f"| {make(PASSES).name} | {constants} | {left_out[-1]:+.1%} |")
    print(f"\nMean of rows left out: {sum(map(abs, left_out)) / len(left_out):.1%}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="fit the constants anew, and without each of the rows")
    args = parser.parse_args()
    rows, rest = [make(PASSES) for make in TABLE_1], list(others())
    for title, chosen in (
        ("Table 1 of arXiv 2104.04473 (fitted)", rows),
        ("Rows that had no part in the fit", rest),
        ("Rows that lack a fact (not counted)", list(unsure())),
    ):
        lines, mean = table(chosen)
        print(f"## {title}\n", *lines, f"\nMean error {mean:.1%}.\n", sep="\n")
    print("## Where the time goes\n", *where(rows + rest), sep="\n")
    if args.fit:
        fit()


if __name__ == "__main__":
    main()

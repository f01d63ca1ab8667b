"""What the search found, as text to read at a terminal."""

from .machines import GiB
from .search import SAME, USABLE, best_of_each_place

ROWS = 10
_PARTS = {
    "products": "matrix products",
    "traffic": "memory traffic of activations and weights",
    "calls": "telling the GPU one small operation after another",
    "tensor": "sums over the tensor axis",
    "context": "keys and values of other parts of sequences",
    "pipeline": "messages between stages",
    "bubble": "idle time of the pipeline",
    "data": "gradients and weights on the data axis",
    "optimizer": "the optimizer",
}


def report(config, shapes, machine, nodes, per_node, found):
    """The table, the refused, the explanation and the section to write, as one text."""
    shown = best_of_each_place(found.options)[:ROWS]
    train = config.train
    size = nodes * per_node
    head = (
        f"{size} x {machine.name} ({nodes_of(nodes, per_node)}), {shapes.parameters / 1e6:,.1f} M parameters, "
        f"{train.precision}, {train.global_batch_size} sequences of {train.sequence_length} tokens a step, "
        f"{train.max_steps} steps"
    )
    lines = [head, "", *_table(config, shapes, machine, nodes, shown), "", _refused(machine, found), ""]
    lines += _explain(config, shapes, machine, nodes, found, shown)
    lines += ["", *section(config, shown[0])]
    return "\n".join(lines)


def nodes_of(nodes, per_node):
    return f"{nodes} node{'s' * (nodes > 1)} of {per_node}"


def summary(option, config, shapes, machine, nodes):
    """{name: number} of what an Option costs: seconds, tokens/s, MFU, node-hours and kWh of the whole run."""
    work, train = option.work, config.train
    hours = option.time.step * train.max_steps / 3600
    ranks = work.layout.size
    useful = 3 * shapes.flops * train.global_batch_size / option.time.step / ranks
    return {
        "step_s": option.time.step,
        "tokens_per_s": option.tokens_per_s,
        "mfu": useful / machine.peak(train.precision),
        "memory_bytes": option.memory.total,
        "data_bytes": option.volume.data,
        "tensor_bytes": option.volume.tensor,
        "context_bytes": option.volume.context,
        "pipeline_bytes": option.volume.pipeline,
        "bubble": option.time.bubble / option.time.step,
        "node_hours": hours * nodes,
        "energy_kwh": hours * ranks * machine.watts / 1000,
    }


def _table(config, shapes, machine, nodes, options):
    names = ("data", "tensor", "seq", "ctx", "pipe", "sharding", "micro", "ckpt", "schedule", "GiB", "step s",
             "tokens/s", "MFU", "idle", "GB/step data", "tensor", "ctx", "pipe", "node-h", "kWh")  # fmt: skip
    rows = [names]
    for option in options:
        work, told = option.work, summary(option, config, shapes, machine, nodes)
        made = work.layout
        how = {"1f1b": "1f1b", "interleaved": f"interl. {work.stages_per_rank}", "zero_bubble": "zero bub."}
        rows.append((
            str(made.data), str(made.tensor), "yes" if work.sequence else "no", str(made.context), str(made.pipeline),
            work.sharding, str(work.micro_batch), "yes" if work.checkpointing else "no",
            how[work.schedule] if made.pipeline > 1 else "-",
            _short(told["memory_bytes"] / GiB), _short(told["step_s"]), _short(told["tokens_per_s"]),
            f"{told['mfu']:.0%}", f"{told['bubble']:.0%}", _short(told["data_bytes"] / 1e9),
            _short(told["tensor_bytes"] / 1e9), _short(told["context_bytes"] / 1e9),
            _short(told["pipeline_bytes"] / 1e9), _short(told["node_hours"]), _short(told["energy_kwh"]),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _short(number):
    """Three significant digits, thousands set apart."""
    if number == 0:
        return "0"
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}" if number >= 0.001 else f"{number:.1e}"


def _refused(machine, found):
    total = sum(found.refused.values())
    fit = f"{len(found.options)} run files fit {USABLE * machine.memory / GiB:.1f} of {machine.memory / GiB:.0f} GiB"
    if not total:
        return f"{fit}; none was refused"
    reasons = [f"{count} {_reason(kind, found)}" for kind, count in found.refused.most_common(4)]
    more = len(found.refused) - len(reasons)
    return f"{fit}; {total} were refused: {'; '.join(reasons)}" + (f"; {more} other reasons" if more > 0 else "")


def _reason(kind, found):
    if kind == "memory":
        return f"for memory (the least of them needs {found.least.total / GiB:.1f} GiB a rank)"
    return f'like "{found.examples[kind]}"'


def _explain(config, shapes, machine, nodes, found, shown):
    best = shown[0]
    told = summary(best, config, shapes, machine, nodes)
    parts = sorted(((seconds, name) for name, seconds in vars(best.time).items()), reverse=True)
    shares = [
        f"{_PARTS[name]} {seconds / best.time.step:.0%}"
        for seconds, name in parts[:3]
        if seconds > 0.005 * best.time.step
    ]
    memory = best.memory
    why = (
        f"Why: {_named(best)} is the {'best' if len(found.options) > 1 else 'only one'} of {len(found.options)} that "
        f"fit (of those within {SAME - 1:.0%} of the fastest, the simplest): {_short(told['step_s'])} s a step, "
        f"{_short(told['tokens_per_s'])} tokens/s, {told['mfu']:.0%} of the peak, {_short(told['node_hours'])} "
        f"node-hours and {_short(told['energy_kwh'])} kWh of {machine.name} for the run."
    )
    limits = (
        f"What limits it: {', '.join(shares)} of the step; memory {_short(memory.total / GiB)} GiB a rank = weights "
        f"{_short(memory.weights / GiB)} + gradients {_short(memory.gradients / GiB)} + optimizer "
        f"{_short(memory.optimizer / GiB)} + activations {_short(memory.activations / GiB)} + logits "
        f"{_short(memory.logits / GiB)}."
    )
    if len(shown) == 1:
        return [why, limits, "Runner-up: none."]
    second = shown[1]
    more = second.time.step / best.time.step - 1
    hours = summary(second, config, shapes, machine, nodes)["node_hours"] - told["node_hours"]
    grown = max(vars(second.time), key=lambda name: getattr(second.time, name) - getattr(best.time, name))
    where = f", most of it in {_PARTS[grown]}" if more > 0.005 else ""
    equal = " (which counts as equal: it is less simple)" if more <= SAME - 1 else ""
    hours = f"{'-' if hours < 0 else '+'}{_short(abs(hours))} node-hours"
    runner = (
        f"Runner-up: {_named(second)} would take {more:+.1%} time and {hours}{where}{equal}; it needs "
        f"{_short(second.memory.total / GiB)} GiB a rank."
    )
    return [why, limits, runner]


def _named(option):
    work = option.work
    words = [work.layout.describe() + (" with slices of the sequence" if work.sequence else "")]
    if work.layout.shard > 1:
        words.append(f"sharding {work.sharding}")
    if work.schedule != "1f1b":
        words.append(work.schedule.replace("_", " "))
    words.append(f"micro-batches of {work.micro_batch}")
    if work.checkpointing:
        words.append("activation checkpointing")
    return ", ".join(words)


def section(config, option):
    """Lines of TOML: what the winner changes in the run file, and its [parallel] without what is default."""
    parallel, train = option.config.parallel, option.config.train
    given = type(parallel)().model_dump()
    lines = ["[parallel]"]
    lines += [f"{key} = {_toml(value)}" for key, value in parallel.model_dump().items() if value != given[key]]
    lines += ["[train]", f"micro_batch_size = {train.micro_batch_size}"]
    return [*lines, f"activation_checkpointing = {_toml(train.activation_checkpointing)}"]


def _toml(value):
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)

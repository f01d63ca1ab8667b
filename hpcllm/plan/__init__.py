"""What a run file would do on a machine, before it runs there: which rank does what, and which layout is the fastest.

`show_mesh` and `plan` are the two questions. `machines` knows GPUs, `count` what a model holds and does (`shapes`),
`cost` what a layout makes of that, `search` tries all layouts, `report` tells. Needs neither MPI nor a GPU.
"""

import json
from pathlib import Path

from .. import lora, model, weights
from ..errors import DataError, MissingInput, UsageError
from ..parallel import apply, mesh
from ..tasks import TASKS
from . import count, machines, report, search
from .machines import GiB


def show_mesh(config, hosts):
    """Text: the ranks by host with their place on each axis, and what a step is made of. Raises UsageError.

    config: config.Config; hosts: the name of each rank's host, in rank order.
    """
    layout = mesh.layout(config.parallel, hosts)
    accumulated = config.train.accumulation(layout.data)
    apply.check(model.configuration(config.model), layout, config.parallel.stages_per_rank, config.parallel.sequence)
    return (
        f"{mesh.picture(layout, hosts)}\n"
        f"a step: {config.train.global_batch_size} sequences = {accumulated} micro-batches of "
        f"{config.train.micro_batch_size} on each of {layout.data} data-parallel ranks"
    )


def plan(config, nodes, per_node, gpu, measured=None):
    """(text, config.Config of the fastest layout) for a run file on `nodes` nodes of `per_node` GPUs called `gpu`.

    measured: a file that `hpcllm doctor --json` printed to. Raises UsageError for a GPU that is not known and for a
    model that fits in no way, MissingInput and DataError for a file that cannot be used.
    """
    if config.train.max_steps is None:
        raise UsageError("plan: how many steps num_train_epochs are, the data say: give train.max_steps=N for a plan")
    machine = machines.find(gpu)
    if measured:
        machine = machines.measured(machine, _read(measured))
    made = model.configuration(config.model, _words(config))
    shapes = shapes_of(config, made, machine.name != "cpu")
    found = search.search(config, made, shapes, machine, nodes, per_node)
    if not found.options:
        raise UsageError(_nothing(config, shapes, machine, nodes, per_node, found))
    return report.report(config, shapes, machine, nodes, per_node, found), found.options[0].config


def shapes_of(config, made, gpu=True):
    """The shapes.Shapes of a run file's model. made: transformers' configuration of it; gpu: as for `count.count`."""
    train = config.train
    task = TASKS[config.model.task]
    targets = max(1, round(task.target_fraction(config.data) * train.sequence_length))
    model.check_length(made, train.sequence_length)

    def make():
        net = task.model_class().from_config(made, dtype=count.torch.float32)
        if config.lora:
            with weights.absent():  # PEFT moves to its place what is somewhere else, and fake tensors do not move
                lora.adapt(net, config.lora.model_dump())
            weights.give([net], "cpu")
        model.freeze_named(net, config.model.freeze)
        return net

    return count.count(make, train.sequence_length, targets, train.precision, gpu)


def _words(config):
    """The tokenizer's model.Vocabulary where it is there; without, the model's vocabulary is its family's own."""
    if config.model.init_from or not Path(config.data.tokenizer_dir).is_dir():
        return None
    from ..data import tokenizer

    return model.vocabulary(tokenizer.load(config.data.tokenizer_dir))


def _read(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInput(f"plan: --measured {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"plan: --measured {path} cannot be read: {error}") from None


def _nothing(config, shapes, machine, nodes, per_node, found):
    """The sentence for a model that fits nowhere."""
    told = f"plan: no layout of {nodes * per_node} x {machine.name} ({report.nodes_of(nodes, per_node)}) runs this"
    if found.least is None:
        reason, times = found.refused.most_common(1)[0]
        return f"{told}: {times} of {sum(found.refused.values())} are refused like: {found.examples[reason]}"
    least, room = found.least, search.USABLE * machine.memory
    return (
        f"{told}: {shapes.parameters / 1e9:.2f} G parameters need at least {least.total / GiB:.1f} GiB a rank (weights "
        f"{least.weights / GiB:.1f}, gradients {least.gradients / GiB:.1f}, optimizer {least.optimizer / GiB:.1f}, "
        f"activations {least.activations / GiB:.1f}, logits {least.logits / GiB:.1f}), and {room / GiB:.1f} of "
        f"{machine.memory / GiB:.0f} are usable; give it more nodes"
    )

"""What a run file would do on a machine, before it runs there: which rank does what on which host."""

from . import model
from .parallel import apply, mesh


def show_mesh(config, hosts):
    """Text: the ranks by host with their place on each axis, and what a step is made of. Raises UsageError.

    config: config.Config; hosts: the name of each rank's host, in rank order.
    """
    layout = mesh.layout(config.parallel, hosts)
    accumulated = config.train.accumulation(layout.data)
    apply.check(model.configuration(config.model), layout)
    return (
        f"{mesh.picture(layout, hosts)}\n"
        f"a step: {config.train.global_batch_size} sequences = {accumulated} micro-batches of "
        f"{config.train.micro_batch_size} on each of {layout.data} data-parallel ranks"
    )

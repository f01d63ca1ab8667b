"""What the tasks of labelled data have in common."""

from ..errors import DataError


def require(meaning, kinds, task):
    """Raise DataError for data that have no labels, or labels of another kind than the task's."""
    if meaning is None:
        raise DataError(f"data: these shards are plain text, {task} needs labels: hpcllm prepare --task {task}")
    if meaning["kind"] not in kinds:
        raise DataError(
            f'data: these shards have labels of the kind "{meaning["kind"]}", {task} takes {", ".join(kinds)}'
        )


def named(names, count):
    """Names of labels as a model's configuration has them."""
    names = names or [f"LABEL_{number}" for number in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def inputs(given):
    """The model's keyword arguments. given: those of the micro-batch."""
    return given


def target_fraction(data):
    """Fraction of the tokens that reach the output layer, at most."""
    return 1.0

"""Short runs on labelled data, and what they must have in common whatever the layout."""

import json
from pathlib import Path

import pytest

import hpcllm.mpi
from hpcllm import config, sources, train

PLAIN = {"train.optimizer": "sgd", "train.sgd_momentum": 0.9, "train.learning_rate": 0.05}
LAYOUTS = pytest.mark.parametrize(
    "layout",
    [{}, {"sharding": "none"}, {"sharding": "full"}, {"tensor": 2, "sharding": "none"}],
    ids=lambda layout: "-".join(f"{key}-{value}" for key, value in layout.items()) or "auto",
)


def load(output, data, model, sequence_length, changes):
    """The settings of a run of six steps.

    data: the folder of its parts; model: the section; changes: {"section.key": value}.
    """
    values = {
        "run": {"output_dir": str(output), "seed": 3},
        "data": {part: f"{data}/{part}" for part in ("train", "validation", "test")},
        "model": model,
        "train": {
            "max_steps": 6,
            "global_batch_size": 24,
            "micro_batch_size": 2,
            "sequence_length": sequence_length,
            "learning_rate": 5e-3,
            "warmup_steps": 2,
        },
    }
    return config.load(values, [f"{key}={value}" for key, value in changes.items()])


def records(output, key="loss"):
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def shared(world, path):
    return Path(world.comm.bcast(str(path)))


def opened(run, world, part):
    words = sources.read_tokenizer(run.data.tokenizer_dir)
    return sources.open_source(run, world, getattr(run.data, part), words)


def alone_and_together(world, settings, tmp_path, layout):
    """Train as `settings(output, **changes)` says, by SGD, alone and on all ranks in `layout`; the losses are the same.

    Returns [(name of a score, alone, together)] of evaluation and test.
    """
    if world.size % layout.get("tensor", 1) or 12 % world.size:
        pytest.skip("ranks do not divide")
    base = shared(world, tmp_path)
    changes = {**PLAIN, "train.eval_every_steps": 3}
    alone = train.train(settings(tmp_path / "alone", **changes), hpcllm.mpi.alone(world))
    layout = {f"parallel.{key}": value for key, value in layout.items()}
    results = train.train(settings(base / "run", **changes, **layout), world)
    for key in ("loss", "grad_norm", "eval_loss"):
        assert records(base / "run", key) == pytest.approx(records(tmp_path / "alone", key), rel=1e-5), key
    return [(key, value, results[key]) for key, value in alone.items() if key.startswith(("eval_", "test_"))]

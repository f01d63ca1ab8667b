"""Whether activations are recomputed: as asked for, or where they would not fit into what memory is left."""

import math

import pytest
from test_train import NO_DROPOUT, losses, settings, shared

import hpcllm.mpi
from hpcllm import train
from hpcllm.plan import fit
from hpcllm.plan.machines import GiB


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_run_recomputes_where_the_rank_with_the_least_room_could_not_keep_all(
    world, prepared, tmp_path, monkeypatch, capfd, kind
):
    base, few = shared(world, tmp_path), 1 << 10
    room = few if world.rank == world.size - 1 else 100 * GiB
    changes = NO_DROPOUT if kind == "bert" else {k: v for k, v in NO_DROPOUT.items() if k.startswith("train.")}
    plenty = settings(prepared, base / "plenty", kind, **{**changes, "train.activation_checkpointing": "auto"})
    train.train(plenty, world)
    monkeypatch.setattr(fit, "free", lambda world: room)
    train.train(settings(prepared, base / "scarce", kind, **changes), world)
    told = capfd.readouterr().out
    if world.is_root:
        assert "activation checkpointing: off (a rank needs 0." in told
        assert "activation checkpointing: on (a rank needs 0.0" in told and "may fill 0.00)" in told
    assert losses(base / "scarce") == pytest.approx(losses(base / "plenty"), rel=1e-5)


@pytest.mark.mpi
@pytest.mark.parametrize("asked", ["true", "false"])
def test_what_is_asked_for_is_done(world, prepared, tmp_path, monkeypatch, asked):
    base = shared(world, tmp_path)
    monkeypatch.setattr(fit, "free", lambda world: 0 if asked == "false" else math.inf)
    config = settings(prepared, base / "run", **{"train.activation_checkpointing": asked})
    assert fit.checkpointing(config, None, None, world, None) == (asked == "true", "as asked for")


@pytest.mark.mpi
def test_ranks_of_a_host_share_what_is_free(world):
    free = fit.free(hpcllm.mpi.init("cpu"))
    assert 0 < sum(world.comm.allgather(free)) < 1.5 * fit._free_of_host()


def host(folder, lines, groups=()):
    """Arguments of `_free_of_host` for a host with 8 GiB left, the control groups in `lines` and files of `groups`."""
    (folder / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nMemFree: 1 kB\n")
    (folder / "cgroup").write_text("".join(line + "\n" for line in lines))
    for path, text in groups:
        (folder / "groups" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "groups" / path).write_text(text)
    return folder / "meminfo", folder / "cgroup", folder / "groups"


@pytest.mark.parametrize(
    ("lines", "groups", "left"),
    [
        (["0::/"], [], 8 * GiB),
        (["0::/job/step"], [("job/step/memory.max", "max\n"), ("job/step/memory.current", "5")], 8 * GiB),
        (["0::/job/step"], [("job/step/memory.max", str(3 * GiB)), ("job/step/memory.current", str(GiB))], 2 * GiB),
        # The limit is the job's, and a part of what its step uses is files, which the kernel would drop.
        (
            ["0::/job/step"],
            [
                ("job/memory.max", str(3 * GiB)),
                ("job/memory.current", str(2 * GiB)),
                ("job/memory.stat", f"anon 7\ninactive_file {GiB}\n"),
                ("job/step/memory.max", "max"),
            ],
            2 * GiB,
        ),
        (
            ["4:memory:/slurm/job", "1:cpu:/", "0::/"],
            [
                ("memory/slurm/job/memory.limit_in_bytes", str(2 * GiB)),
                ("memory/slurm/job/memory.usage_in_bytes", str(GiB)),
                ("memory/slurm/job/memory.stat", f"inactive_file 1\ntotal_inactive_file {GiB // 2}\n"),
            ],
            1.5 * GiB,
        ),
        (["0::/full"], [("full/memory.max", "5"), ("full/memory.current", "9")], 0),
    ],
)
def test_limits_of_control_groups_count(tmp_path, lines, groups, left):
    assert fit._free_of_host(*host(tmp_path, lines, groups)) == left

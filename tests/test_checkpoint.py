"""Checkpoints and files: whole or not there, exact, verified, never the only one deleted."""

import errno
import json
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from hpcllm import checkpoint, config, files, model, optimizer, run_folder, saving
from hpcllm.errors import DataError, IOFailure
from hpcllm.parallel.apply import whole

TINY = BertConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
)  # fmt: skip


@pytest.fixture
def trained(tmp_path):
    """(model, optimizer after two steps, tokenizer folder)."""
    net = BertForMaskedLM(TINY)
    plan = config.Train(max_steps=2, global_batch_size=1, micro_batch_size=1, sequence_length=8, learning_rate=1e-3)
    adjust = optimizer.build(net, plan)
    for _ in range(2):
        net(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        adjust.step()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    return net, adjust, tmp_path / "tokenizer"


def save(tmp_path, trained, step, keep=2):
    net, adjust, tokenizer_dir = trained
    state = {"samples": step * 10}
    return saving.save(MPI.COMM_SELF, tmp_path / "run", step, whole(net), adjust, tokenizer_dir, state, keep)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_weights_and_optimizer_come_back_bit_for_bit(tmp_path, trained, run):
    path = save(tmp_path, trained, 2)
    net, adjust, _ = trained
    checkpoint.verify(path)
    assert checkpoint.read_state(path)["samples"] == 20
    again = model.load(path, "masked_lm")
    assert again.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in net.state_dict().items())
    # BLAS sums in another order in memory that is aligned otherwise than torch's own.
    assert {parameter.data_ptr() % 64 for parameter in again.parameters()} == {0}
    plan = config.Train(max_steps=2, global_batch_size=1, micro_batch_size=1, sequence_length=8, learning_rate=1e-3)
    fresh = optimizer.build(again, plan)
    checkpoint.load_optimizer(path, whole(again), fresh)
    for mine, theirs in zip(again.parameters(), net.parameters(), strict=True):
        assert fresh.state[mine].keys() == adjust.state[theirs].keys()
        assert all(torch.equal(fresh.state[mine][key], value) for key, value in adjust.state[theirs].items())


def test_transformers_loads_the_folder_as_it_is(tmp_path, trained, run):
    path = save(tmp_path, trained, 1)
    theirs = AutoModelForMaskedLM.from_pretrained(path, local_files_only=True)
    shown = torch.arange(8)[None]
    trained[0].eval()
    assert torch.equal(theirs(input_ids=shown).logits, trained[0](input_ids=shown).logits)


def test_the_newest_are_kept_by_step_and_not_by_name_or_time(tmp_path, trained, run):
    for step in (9, 10, 100):
        save(tmp_path, trained, step)
    os.utime(run / "checkpoint-10", (2e9, 2e9))
    assert [path.name for path in checkpoint.find(run)] == ["checkpoint-10", "checkpoint-100"]
    assert sorted(os.listdir(run)) == ["checkpoint-10", "checkpoint-100", "latest"]
    assert os.readlink(run / "latest") == "checkpoint-100"


def test_one_of_the_same_step_is_there_until_the_new_one_is(tmp_path, trained, run, monkeypatch):
    path, reveal = save(tmp_path, trained, 1), files.reveal
    before = (path / "trainer_state.json").read_bytes()

    def looking(*arguments, **how):
        checkpoint.verify(path)
        assert (path / "trainer_state.json").read_bytes() == before
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "reveal", looking)
    with pytest.raises(IOFailure, match="Input/output error"):
        save(tmp_path, trained, 1)
    checkpoint.verify(path)
    monkeypatch.setattr(files, "reveal", reveal)
    save(tmp_path, trained, 1)
    checkpoint.verify(path)
    assert sorted(os.listdir(run)) == ["checkpoint-1", "latest"]


def test_what_a_kill_between_two_renamings_has_left_is_found_again(tmp_path, trained, run):
    path = save(tmp_path, trained, 1)
    path.rename(run / ".checkpoint-1.17.removed")
    (run / ".checkpoint-2.x.tmp").mkdir()  # not complete
    checkpoint.rescue(run)
    assert [path.name for path in checkpoint.find(run)] == ["checkpoint-1"]
    checkpoint.verify(path)
    (run / ".checkpoint-1.17.removed").mkdir()
    checkpoint.remove_unfinished(run)
    assert sorted(os.listdir(run)) == ["checkpoint-1", "latest"]


def test_of_two_that_a_kill_has_left_the_newer_is_taken_and_none_that_was_being_deleted(
    tmp_path, trained, run, monkeypatch
):
    path = save(tmp_path, trained, 1)
    path.rename(run / ".checkpoint-1.4711.removed")
    newer = save(tmp_path, trained, 1)
    (newer / "newer").touch()
    newer.rename(run / ".checkpoint-1.0abc.tmp")
    checkpoint.rescue(run)
    assert (path / "newer").exists()
    checkpoint.remove_unfinished(run)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed here
    monkeypatch.setattr(os, "getpid", lambda: 17)
    save(tmp_path, trained, 2, keep=1)
    assert (run / ".checkpoint-1.17.removed").is_dir()
    checkpoint.rescue(run)
    assert [path.name for path in checkpoint.find(run)] == ["checkpoint-2"]


def test_a_file_system_that_fails_makes_no_checkpoint_damaged(tmp_path, trained, run, monkeypatch):
    path = save(tmp_path, trained, 1)
    monkeypatch.setattr(files, "PAUSES_S", (0.0,))
    read_text, stale = Path.read_text, [OSError(errno.ESTALE, "Stale file handle")] * 3

    def failing(self, *given, **how):
        if self.name == checkpoint.COMPLETE and stale:
            raise stale.pop()
        return read_text(self, *given, **how)

    monkeypatch.setattr(Path, "read_text", failing)
    with pytest.raises(IOFailure, match=f"{path}: Stale file handle"):
        checkpoint.verify(path)
    checkpoint.verify(path)  # after another one, which passes
    (path / checkpoint.COMPLETE).unlink()
    with pytest.raises(DataError, match="not a complete checkpoint"):
        checkpoint.verify(path)


def test_a_tokenizer_that_vanishes_during_a_run_is_in_its_checkpoints(tmp_path, trained, run):
    net, adjust, tokenizer_dir = trained
    saver = saving.Saver(MPI.COMM_SELF, whole(net), adjust, run, tokenizer_dir, 2)
    shutil.rmtree(tokenizer_dir)
    saver.begin(1, {"samples": 10})
    saver.finish()
    assert (run / "checkpoint-1" / "tokenizer.json").read_text() == "{}"
    checkpoint.verify(run / "checkpoint-1")


def test_the_best_is_one_whose_checkpoint_is_there(tmp_path, trained, run):
    assert run_folder.best_there_is(run, {"step": 3}) is None
    net, adjust, tokenizer_dir = trained
    for step, known in ((1, {"step": 1}), (2, {"step": 1})):
        saving.save(MPI.COMM_SELF, run, step, whole(net), adjust, tokenizer_dir, {"best": known}, 9)
    assert run_folder.best_there_is(run, {"step": 3}) == {"step": 1}
    assert run_folder.best_there_is(run, {"step": 2}) == {"step": 2}
    assert run_folder.best_there_is(run, None) is None


def test_a_folder_that_was_never_finished_does_not_count(tmp_path, trained, run):
    save(tmp_path, trained, 1)
    save(tmp_path, trained, 2)
    (run / "checkpoint-2" / ".complete").unlink()
    (run / "checkpoint-x").mkdir()
    assert [path.name for path in checkpoint.find(run)] == ["checkpoint-1"]


@pytest.mark.parametrize("room", [1_000, 12_000, 28_000])
def test_a_save_that_fails_leaves_the_older_checkpoint_and_nothing_else(tmp_path, trained, run, room):
    save(tmp_path, trained, 1, keep=1)
    sizes = {file.name: file.stat().st_size for file in (run / "checkpoint-1").iterdir()}
    assert sizes["model.safetensors"] > 12_000 and sizes["optimizer.safetensors"] > 28_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # as a quota: writes beyond it fail
    try:
        with pytest.raises(IOFailure, match=r"checkpoint-2"):
            save(tmp_path, trained, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(run)) == ["checkpoint-1", "latest"]
    checkpoint.verify(run / "checkpoint-1")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_every_damage_is_found_and_the_file_named(tmp_path, trained, run, name, damage):
    path = save(tmp_path, trained, 1)
    content = bytearray((path / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    (path / name).write_bytes(content[:-1] if damage == "cut" else content)
    if damage == "remove":
        (path / name).unlink()
    with pytest.raises(DataError, match=name):
        checkpoint.verify(path)


@pytest.mark.parametrize("content", ["", "{}", '{"files": {"a": 1}}', '{"files": {"../../etc/passwd": {}}}', "[]"])
def test_a_marker_that_says_nothing_is_refused(tmp_path, trained, run, content):
    path = save(tmp_path, trained, 1)
    (path / ".complete").write_text(content)
    with pytest.raises(DataError, match=r"\.complete"):
        checkpoint.verify(path)


def test_a_pickle_is_never_read(tmp_path, trained, run):
    path = save(tmp_path, trained, 1)
    torch.save(trained[0].state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has weights in pytorch_model\.bin only"):
        model.load(path, "masked_lm")


def test_a_checkpoint_with_missing_weights_is_not_completed_at_random(tmp_path, trained, run):
    path = save(tmp_path, trained, 1)
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors.pop("bert.embeddings.LayerNorm.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"LayerNorm\.weight"):
        model.load(path, "masked_lm")


def test_files_follow_the_users_umask(tmp_path, trained, run):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, trained, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_a_text_is_replaced_whole(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1})
    files.write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2}
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(IOFailure, match=r"nowhere/\.a\.json.*: No such file"):
        files.write_text(tmp_path / "nowhere" / "a.json", "x")

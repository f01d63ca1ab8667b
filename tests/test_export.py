"""Exports: the folder that `save_pretrained` would give, whole or not there, and never from a damaged checkpoint."""

import json
import os
import resource
import weakref
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import hpcllm.mpi
from hpcllm import __main__, config, export, files, model, saving, tensors
from hpcllm.errors import Refusal
from hpcllm.parallel.apply import whole

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "bert": ("masked_lm", LAYERS),
    "gpt2": ("causal_lm", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    # What these have in memory is published otherwise: experts one by one; queries, keys and values in one tensor.
    "mixtral": ("causal_lm", {**LAYERS, "num_key_value_heads": 1, "num_local_experts": 3}),
    "nomic_bert": ("masked_lm", LAYERS),
    "jina_embeddings_v3": ("masked_lm", LAYERS),  # its tied weights come under their second name first
}
WITH_BUFFERS = {
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
}
AUTO = {"masked_lm": AutoModelForMaskedLM, "causal_lm": AutoModelForCausalLM}
DTYPES = [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]


@pytest.fixture
def base(tmp_path):
    """A folder of all ranks."""
    return Path(hpcllm.mpi.join().comm.bcast(str(tmp_path)))


@pytest.fixture
def saved(base, prepared):
    """saved(kind, step): (model of `kind`, its checkpoint of `step` in the run base/"run"). Root writes."""

    def save(kind="bert", step=3, change=None):
        task, shape = MODELS[kind]
        torch.manual_seed(step)
        made = CONFIG_MAPPING[kind](**shape, vocab_size=600, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        net = AUTO[task].from_config(made).eval()
        if change:
            change(net)
        values = {
            "run": {"output_dir": str(base / "run")},
            "data": {"train": f"{prepared}/train"},
            "model": {"task": task, "config": {"model_type": kind, **shape}},
            "train": dict.fromkeys(("max_steps", "global_batch_size", "micro_batch_size"), 1)
            | {"sequence_length": 8, "learning_rate": 1e-3, "optimizer": "sgd"},
        }
        if hpcllm.mpi.join().is_root:
            (base / "run").mkdir(exist_ok=True)
            state = {"samples": 0, "config": config.load(values, []).model_dump(exclude_none=True)}
            adjust = torch.optim.SGD(net.parameters(), lr=1e-3)
            saving.save(MPI.COMM_SELF, base / "run", step, whole(net), adjust, prepared / "tokenizer", state, 2)
        hpcllm.mpi.join().comm.Barrier()
        return net, base / "run" / f"checkpoint-{step}"

    return save


def run(*words):
    """The command, as `main` calls it."""
    __main__.export(__main__.parser().parse_args(["export", *map(str, words)]))


def refused(code, sentence, *words):
    with pytest.raises(Refusal, match=sentence) as caught:
        run(*words)
    assert caught.value.code == code and caught.value.agreed


def weights(folder):
    """{name of file: {name: tensor}}"""
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def flat(parts):
    return {name: value for part in parts.values() for name, value in part.items()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


# --- what it writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", "5GB"), ("bf16", "10KB"), ("fp16", "8KB")])
def test_the_folder_is_the_one_of_save_pretrained(saved, base, kind, dtype, limit):
    net, path = saved(kind)
    run(path, base / "out", "--dtype", dtype, "--max-shard-size", limit)
    net.to(export.DTYPES[dtype]).save_pretrained(base / "reference", max_shard_size=limit)
    ours, theirs = weights(base / "out"), weights(base / "reference")
    assert (len(theirs) > 2) == (limit != "5GB")
    names = ["config.json", "model.safetensors.index.json"]
    if (
        kind == "mixtral" and len(theirs) > 2
    ):  # transformers keeps experts together that were one tensor, beyond the limit
        names, ours, theirs = names[:1], {"": flat(ours)}, {"": flat(theirs)}
    assert ours.keys() == theirs.keys()
    for name, part in theirs.items():
        same(ours[name], part)
    for name in names:
        if (base / "reference" / name).is_file():
            assert (base / "out" / name).read_text() == (base / "reference" / name).read_text()
    for file in (base / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    written, known = ({file.name for file in (base / name).iterdir()} for name in ("out", "reference"))
    others = {name for name in written - known if not name.endswith(".safetensors")}
    assert others == {"README.md", "tokenizer.json", "tokenizer_config.json"}
    assert ("generation_config.json" in written) == ("generation_config.json" in known)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize(("dtype", "kept"), DTYPES)
def test_transformers_loads_it_with_its_dtype_and_tied_weights(saved, base, kind, dtype, kept):
    net, path = saved(kind)
    run(path, base / "out", "--dtype", dtype, "--max-shard-size", "20KB")
    auto = AUTO[MODELS[kind][0]]
    loaded, report = auto.from_pretrained(
        base / "out", dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    assert not any(report.values())
    assert loaded.dtype == kept
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    same(loaded.state_dict(), {name: value.to(kept) for name, value in net.state_dict().items()})
    tokenizer = AutoTokenizer.from_pretrained(base / "out", local_files_only=True)
    original = AutoTokenizer.from_pretrained(path, local_files_only=True)
    text = "Return the name of the file."
    assert tokenizer(text).input_ids == original(text).input_ids and len(tokenizer) == len(original)


def test_shards_are_divided_but_the_same_tensors(saved, base):
    _, path = saved("gpt2")
    run(path, base / "one")
    run(path, base / "many", "--max-shard-size", "10KiB")
    (one,) = weights(base / "one").values()
    many = weights(base / "many")
    assert len(many) > 3
    same(flat(many), one)
    for part in many.values():
        assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= 10 << 10


def test_of_a_run_the_newest_checkpoint_is_taken_and_the_line_says_what_came(saved, base, capsys):
    saved(step=9)
    newest, path = saved(step=10)
    capsys.readouterr()
    run(base / "run", base / "out")
    word, told = capsys.readouterr().out.split(" ", 1)
    written = list((base / "out").iterdir())
    assert word == "done:" and json.loads(told) == {
        "checkpoint": str(path),
        "output": str(base / "out"),
        "dtype": "fp32",
        "files": len(written),
        "bytes": sum(file.stat().st_size for file in written),
    }
    same(model.load(base / "out", "masked_lm").state_dict(), newest.state_dict())


def test_only_one_tensor_is_in_memory(saved, base, monkeypatch):
    _, path = saved("gpt2")
    write, seen = tensors.Outline.write, []

    def watched(self, handle, name, box, values):
        assert not [before for before in seen if before() is not None]
        seen.append(weakref.ref(values))
        write(self, handle, name, box, values)

    monkeypatch.setattr(tensors.Outline, "write", watched)
    run(path, base / "out")
    assert len(seen) > 20


def test_numbers_that_a_dtype_cannot_hold_are_refused(saved, base):
    def enlarge(net):
        with torch.no_grad():
            net.transformer.h[1].mlp.c_fc.bias[3] = -70000.0
            net.transformer.h[1].mlp.c_fc.bias[4] = torch.finfo(torch.float32).max
            net.transformer.h[0].mlp.c_fc.bias[5] = 65519.0  # rounds to 65504, the largest of fp16

    _, path = saved("gpt2", change=enlarge)
    name = r"transformer\.h\.1\.mlp\.c_fc\.bias: 3\.40282e\+38 is beyond the range of"
    refused(65, name + r" fp16 \(largest: 65504\); export as bf16 or fp32", path, base / "out", "--dtype", "fp16")
    refused(65, name + r" bf16 \(.*\); export as fp32", path, base / "out", "--dtype", "bf16")
    assert os.listdir(base) == ["run"]


def test_infinities_that_were_there_and_whole_numbers_stay():
    values = torch.tensor([float("inf"), float("nan"), 1.0])
    assert str(export.rounded("a", values, torch.float16).tolist()) == "[inf, nan, 1.0]"
    count = torch.tensor([1 << 40])
    assert torch.equal(export.rounded("a", count, torch.float16), count)


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("4GiB", 4 << 30), ("7", 7), ("2B", 2), ("3TB", 3 * 10**12)],
)
def test_sizes_are_read(text, count):
    assert export.size(text) == count


# --- what it refuses, and what is left then ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "0", "0.1B", "-5GB", "5GB5", "1e9", "nan", "9" * 400, "٣GB"])
def test_what_is_no_size_is_a_sentence(text, base):
    refused(2, "is not a size; say for example", base, base / "out", f"--max-shard-size={text}")


def test_a_folder_that_is_in_the_way_stays(saved, base):
    _, path = saved()
    (base / "out").mkdir()
    (base / "out" / "thesis.tex").write_text("x")
    (base / "link").symlink_to(path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    refused(73, r"out exists; choose another name or --overwrite", path, base / "out")
    refused(73, r"link exists", path, base / "link")
    refused(73, "has no config.json", path, base / "out", "--overwrite")
    refused(73, "is not a model folder", path, base / "out" / "thesis.tex", "--overwrite")
    refused(73, "is not a model folder", path, base / "link", "--overwrite")
    refused(73, "there is no folder to write it in", path, base / "nowhere" / "out")
    refused(73, r"also holds \.complete, .*; --overwrite would delete", path, path, "--overwrite")
    (base / "config.json").write_text("{}")
    refused(73, "also holds link, out, run;", path, base, "--overwrite")
    refused(66, "neither a checkpoint nor a run folder", base / "out", base / "new")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert (base / "out" / "thesis.tex").read_text() == "x"
    assert sorted(os.listdir(base)) == ["config.json", "link", "out", "run"]


def test_a_model_folder_is_replaced_whole(saved, base):
    _, old = saved(step=1)
    run(old, base / "out", "--max-shard-size", "10KB")
    new, path = saved(step=2)
    run(path, base / "out", "--overwrite")
    assert list(weights(base / "out")) == ["model.safetensors"]
    assert not (base / "out" / "model.safetensors.index.json").exists()
    same(model.load(base / "out", "masked_lm").state_dict(), new.state_dict())
    assert sorted(os.listdir(base)) == ["out", "run"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
def test_a_checkpoint_with_a_flipped_bit_is_refused(saved, base, name):
    _, path = saved()
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    refused(65, name, path, base / "out")
    assert os.listdir(base) == ["run"]


def test_a_checkpoint_without_all_that_its_model_needs_is_refused(saved, base, monkeypatch):
    # hpcllm trains parameters and saves them; what such a model keeps in buffers would be missing.
    monkeypatch.setitem(MODELS, "deepseek_v3", ("causal_lm", {**LAYERS, **WITH_BUFFERS, "first_k_dense_replace": 1}))
    _, path = saved("deepseek_v3")
    refused(65, r"weights missing .*: model\.layers\.1\.mlp\.gate\.e_score_correction_bias", path, base / "out")
    assert os.listdir(base) == ["run"]


def test_weights_that_are_not_the_models_are_refused(saved, base):
    _, path = saved()
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 1}))
    with pytest.raises(Refusal, match=r"another shape or too many: bert\.encoder\.layer\.1") as caught:
        export.export(path, "masked_lm", base / "out")
    assert caught.value.code == 65 and os.listdir(base) == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["copying", "renaming"])
def test_an_interrupted_export_leaves_what_was_there(saved, base, monkeypatch, overwrite, where):
    _, path = saved()
    if overwrite:
        run(path, base / "out", "--dtype", "bf16")
    before = weights(base / "out")
    write, count = tensors.Outline.write, []

    def interrupted(self, *arguments):
        count.append(None)
        if len(count) == 5:
            raise KeyboardInterrupt
        write(self, *arguments)

    def rename(source, target, rename=os.rename):
        if Path(source).suffix == ".tmp":
            raise KeyboardInterrupt
        rename(source, target)

    if where == "copying":
        monkeypatch.setattr(tensors.Outline, "write", interrupted)
    else:
        monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        run(path, base / "out", *(["--overwrite"] if overwrite else []))
    assert sorted(os.listdir(base)) == (["out", "run"] if overwrite else ["run"])
    assert weights(base / "out").keys() == before.keys()
    for name, part in before.items():
        same(weights(base / "out")[name], part)


@pytest.mark.parametrize("room", [100, 12_000])
def test_a_full_disk_is_an_io_failure_and_leaves_nothing(saved, base, room):
    _, path = saved()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # as a quota: writes beyond it fail
    try:
        refused(74, "out: ", path, base / "out", "--max-shard-size", "10KB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(base) == ["run"]


def test_what_comes_in_the_way_meanwhile_stays(saved, base, monkeypatch):
    _, path = saved()
    beside = export._write_beside

    def meanwhile(*arguments):
        beside(*arguments)
        (base / "out").mkdir()

    monkeypatch.setattr(export, "_write_beside", meanwhile)
    refused(73, "out exists", path, base / "out")
    assert sorted(os.listdir(base)) == ["out", "run"] and not os.listdir(base / "out")


def test_what_a_killed_export_left_is_told(saved, base, capsys):
    _, path = saved()
    (base / ".out.abc.tmp").mkdir()
    (base / ".other.abc.tmp").mkdir()
    run(path, base / "out")
    told = capsys.readouterr().err
    assert ".out.abc.tmp is of a job that was killed" in told and "other" not in told


# --- in a job ----------------------------------------------------------------------------------------------------


@pytest.mark.mpi()
def test_root_writes_and_all_ranks_end_alike(world, saved, base, capsys):
    net, path = saved()
    world.comm.Barrier()
    run(path, base / "out")
    assert ("done: " in capsys.readouterr().out) == world.is_root
    same(model.load(base / "out", "masked_lm").state_dict(), net.state_dict())
    world.comm.Barrier()
    refused(73, "exists", path, base / "out")
    world.comm.Barrier()
    assert sorted(os.listdir(base)) == ["out", "run"]

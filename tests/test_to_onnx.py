"""ONNX graphs say what the model says, at any shape, under the names that others look for, or are not there."""

import json
import os
import re
import resource
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mpi4py import MPI
from transformers import CONFIG_MAPPING

from hpcllm import __main__, config, export, model, saving, to_onnx
from hpcllm.errors import Refusal
from hpcllm.parallel.apply import whole
from hpcllm.tasks import TASKS

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
TEXT = ["input_ids", "attention_mask", "token_type_ids"]
# Of each task: the model, and the names of its graph's inputs and outputs.
TASKS_OF = {
    "sequence_classification": ("bert", {**BERT, "num_labels": 3}, TEXT, ["logits"]),
    "token_classification": ("bert", {**BERT, "num_labels": 5}, TEXT, ["logits"]),
    "question_answering": ("bert", BERT, TEXT, ["start_logits", "end_logits"]),
    "masked_lm": ("bert", BERT, TEXT, ["logits"]),
    "causal_lm": ("gpt2", GPT, TEXT[:2], ["logits"]),
    "seq2seq_lm": ("t5", T5, [*TEXT[:2], "decoder_input_ids"], ["logits", "encoder_last_hidden_state"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, prepared):
    """saved(task): the checkpoint of a model for it, in a run of its own."""

    def save(task):
        base = tmp_path_factory.mktemp(task)
        kind, shape, _, _ = TASKS_OF[task]
        torch.manual_seed(1)
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
        made = CONFIG_MAPPING[kind](**shape, **special, vocab_size=600, initializer_range=0.5)
        net = TASKS[task].model_class().from_config(made)
        values = {
            "run": {"output_dir": str(base / "run")},
            "data": {"train": f"{prepared}/train"},
            "model": {"task": task, "config": {"model_type": kind}},
            "train": dict.fromkeys(("max_steps", "global_batch_size", "micro_batch_size"), 1)
            | {"sequence_length": 24, "learning_rate": 1e-3, "optimizer": "sgd"},
        }
        (base / "run").mkdir()
        state = {"samples": 0, "config": config.load(values, []).model_dump(exclude_none=True)}
        adjust = torch.optim.SGD(net.parameters(), lr=1e-3)
        saving.save(MPI.COMM_SELF, base / "run", 1, whole(net), adjust, prepared / "tokenizer", state, 1)
        return base / "run" / "checkpoint-1"

    return save


@pytest.fixture(scope="module", params=TASKS_OF)
def exported(request, saved):
    """A folder with a graph, for each task: task, path, and what export told."""
    path = saved(request.param)
    told = export.export(path, request.param, path.parent.parent / "out", onnx=True)
    return SimpleNamespace(task=request.param, path=path.parent.parent / "out", told=told)


@pytest.fixture(scope="module")
def bert(saved):
    return saved("masked_lm")


def run(*words):
    """The command, as `main` calls it."""
    __main__.export(__main__.parser().parse_args(["export", *map(str, words)]))


def refused(code, sentence, path, *words):
    """It is refused, and leaves nothing."""
    with pytest.raises(Refusal, match=sentence) as caught:
        run(path, path.parent.parent / "refused", "--onnx", *words)
    assert caught.value.code == code and caught.value.agreed
    assert not [name for name in os.listdir(path.parent.parent) if "refused" in name]


def some(task, rows, length, padded):
    """Inputs of rows that are filled up with more and more padding, {name: int64 [rows, tokens]}."""
    torch.manual_seed(rows)
    given = {name: torch.randint(1, 600, (rows, length)) for name in TASKS_OF[task][2]}
    if "token_type_ids" in given:
        given["token_type_ids"] %= 2
    if "decoder_input_ids" in given:
        given["decoder_input_ids"] = torch.randint(1, 600, (rows, length + 2))
    left = length - torch.arange(rows) % length if padded else torch.full((rows,), length)
    given["attention_mask"] = (torch.arange(length) < left.unsqueeze(1)).long()
    return given


def furthest(folder, task, given):
    """The largest difference between the outputs of graph and model, and the largest output."""
    outputs = TASKS_OF[task][3]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(outputs, {name: value.numpy() for name, value in given.items()})
    with torch.inference_mode():
        expected = model.load(folder, task).eval()(**given)
    both = [(torch.from_numpy(a), expected[name]) for a, name in zip(found, outputs, strict=True)]
    assert all(a.shape == b.shape for a, b in both)
    return max((a - b).abs().max().item() for a, b in both), max(b.abs().max().item() for _, b in both)


# --- what it writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 9), (4, 3), (5, 1), (2, 40)])
@pytest.mark.parametrize("padded", [False, True])
def test_it_says_what_transformers_says_at_other_shapes(exported, rows, length, padded):
    difference, largest = furthest(exported.path, exported.task, some(exported.task, rows, length, padded))
    assert difference < 1e-5 * max(1, largest) and largest > 0.1


def test_inputs_and_outputs_have_the_names_types_and_axes_of_optimum(exported):
    graph = onnx.load(exported.path / "model.onnx")
    _, _, inputs, outputs = TASKS_OF[exported.task]
    assert [(entry.domain, entry.version) for entry in graph.opset_import if not entry.domain] == [("", 18)]
    assert [value.name for value in graph.graph.output] == outputs
    found = {
        value.name: (value.type.tensor_type.elem_type, [dim.dim_param for dim in value.type.tensor_type.shape.dim])
        for value in graph.graph.input
    }
    axes = {name: ["batch_size", "sequence_length"] for name in inputs}
    if "decoder_input_ids" in axes:
        axes["decoder_input_ids"] = ["batch_size", "decoder_sequence_length"]
    assert found == {name: (onnx.TensorProto.INT64, names) for name, names in axes.items()}
    told = exported.told["onnx"]
    assert told == {"opset": 18, "inputs": inputs, "outputs": outputs, "largest_difference": told["largest_difference"]}
    assert 0 <= told["largest_difference"] < 1e-5


def test_tied_weights_are_written_once(exported):
    graph = onnx.load(exported.path / "model.onnx").graph
    written = sum(len(tensor.raw_data) for tensor in graph.initializer)
    assert written < (exported.path / "model.safetensors").stat().st_size + 10_000


def test_the_lines_of_the_model_card_run_it(exported, monkeypatch):
    text = (exported.path / "README.md").read_text()
    [lines] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(exported.path)
    names = {}
    exec(lines, names)
    assert len(lines.splitlines()) == 2 + 3 and np.isfinite(names["found"][0]).all()
    assert all(f"`{name}`" in text for side in ("inputs", "outputs") for name in exported.told["onnx"][side])


def test_large_weights_lie_beside_it_without_onnxruntime_onnx_compares_and_overwriting_takes_all(
    bert, monkeypatch, capsys
):
    monkeypatch.setattr(to_onnx, "_ONE_FILE", 1000)
    out = bert.parent.parent / "out"
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "onnxruntime", None)
        capsys.readouterr()
        run(bert, out, "--onnx")
    told = capsys.readouterr()
    [line] = told.out.splitlines()
    word, summary = line.split(" ", 1)
    assert word == "done:" and 0 <= json.loads(summary)["onnx"]["largest_difference"] < 1e-5
    assert "export: writing model.onnx" in told.err
    assert (out / "model.onnx_data").stat().st_size > 30_000 > (out / "model.onnx").stat().st_size
    difference, _ = furthest(out, "masked_lm", some("masked_lm", 3, 6, True))
    assert difference < 1e-4
    run(bert, out, "--overwrite")
    assert not list(out.glob("model.onnx*")) and "ONNX" not in (out / "README.md").read_text()
    shutil.rmtree(out)


# --- what it refuses ---------------------------------------------------------------------------------------------


def test_a_graph_that_says_something_else_is_refused(bert, monkeypatch):
    def without_mask(path, session=to_onnx._session):
        inner = session(path)

        def run(outputs, given):
            return inner.run(outputs, {**given, "attention_mask": np.ones_like(given["attention_mask"])})

        return SimpleNamespace(run=run)

    monkeypatch.setattr(to_onnx, "_session", without_mask)
    refused(65, "bert model says something else than the model: .* lie between them, where 0.0001 may", bert)


def test_a_model_that_torch_cannot_export_is_refused(bert, monkeypatch):
    def fail(*_, **__):
        raise torch.onnx.OnnxExporterError("Try this and that\n" * 40) from ValueError("no such operator\nin line 3")

    monkeypatch.setattr(torch.onnx, "export", fail)
    refused(65, "^bert models cannot be exported to ONNX: no such operator$", bert)


@pytest.mark.parametrize("one_file", [2 * 10**9, 1000])
def test_a_full_disk_is_an_io_failure(bert, monkeypatch, one_file):
    monkeypatch.setattr(to_onnx, "_ONE_FILE", one_file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))  # as a quota: writes beyond it fail
    try:
        refused(74, "refused", bert)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_the_packages_the_user_hears_how_to_install_them(bert, monkeypatch):
    monkeypatch.setattr(to_onnx, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    refused(2, r"^--onnx needs onnx and onnxscript: pip install 'hpcllm\[onnx\]'$", bert)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_graph_beside_other_weights_is_refused(bert, dtype):
    refused(2, f"in fp32, which is another model than weights in {dtype}", bert, "--dtype", dtype)


def test_a_graph_of_what_lora_learnt_alone_is_refused(bert):
    refused(2, "^--onnx draws a whole model, --adapter writes what was learnt alone; export twice$", bert, "--adapter")

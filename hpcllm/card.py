"""The card of an exported model: README.md as Hugging Face's folders have it, from what a run says of itself."""

import itertools
import json
from pathlib import Path

from . import lora, records, run_folder

NAME = "README.md"
_PIPELINES = {
    "masked_lm": "fill-mask",
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "seq2seq_lm": "text2text-generation",
    "dialogue": "text-generation",
}
_LABELS_SHOWN = 200


def card(folder, task, dtype, parameters, library="transformers", graph=None):
    """Markdown about the model of the checkpoint `folder` (Path), exported as `dtype`. parameters: how many; library:
    that loads it.

    graph: what `to_onnx.write` says of an ONNX graph beside the weights, or None.
    What the run's folder around the checkpoint tells, results and node-hours, is in it where that is there.
    """
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config, run = state["config"], folder.parent
    train, section = config["train"], config["model"]
    name = Path(config["run"]["output_dir"]).name
    digest = state.get("data_digest", "unknown")[:16]
    start = f"weights of {Path(section['init_from']).name}" if section.get("init_from") else "random weights"
    rows = {
        "task": task,
        "architecture": f"{', '.join(model['architectures'])}, {parameters / 1e6:.1f} M parameters",
        "weights": f"{dtype}, of {folder.name}",
        "trained from": start,
        "training data": f"{Path(config['data']['train']).parent.name}, digest {digest}",
        "steps": f"{state['step']} of {train['global_batch_size']} sequences",
        "sequences": f"of {train['sequence_length']} tokens at most",
        "optimizer": f"{train['optimizer']}, learning rate {train['learning_rate']:g}, {train['precision']}",
        "seed": config["run"]["seed"],
    }
    learnt = lora.describe(folder)
    if learnt:
        rows["LoRA"] = learnt
    hours = node_hours(run / records.EVENTS, state["step"])
    if hours is not None:
        rows["node-hours"] = f"{hours:.3g}"
    lines = [
        *("---", f"library_name: {library}", f"pipeline_tag: {_PIPELINES[task]}", "tags:", "- hpcllm", "---", ""),
        *(f"# {name}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""),
    ]
    lines += _scores(run / "results.json", folder.name)
    if task.endswith("classification") and model.get("id2label"):
        names = list(model["id2label"].values())
        more = f", and {len(names) - _LABELS_SHOWN} more" if len(names) > _LABELS_SHOWN else ""
        lines += ["## Labels", "", ", ".join(f"`{label}`" for label in names[:_LABELS_SHOWN]) + more, ""]
    if graph:
        lines += _onnx(graph, model)
    return "\n".join([*lines, f"Trained and exported with hpcllm {state['hpcllm']}.", ""])


def _onnx(graph, model):
    """What the ONNX graph takes and gives, and how to run it. model: config.json."""
    taken, given = (", ".join(f"`{name}`" for name in graph[side]) for side in ("inputs", "outputs"))
    read = [name for name in graph["inputs"] if name != "decoder_input_ids"]
    first = f' | {{"decoder_input_ids": [[{model["decoder_start_token_id"]}]]}}' if read != graph["inputs"] else ""
    return [
        *("## ONNX", "", f"`model.onnx` (opset {graph['opset']}, fp32) makes {given} of {taken}:", "", "```python"),
        "import onnxruntime, transformers",
        "",
        'given = transformers.AutoTokenizer.from_pretrained(".")("A text.", return_tensors="np")',
        f"given = {{name: given[name] for name in {read}}}{first}",
        'found = onnxruntime.InferenceSession("model.onnx").run(None, given)',
        *("```", ""),
    ]


def _scores(file, checkpoint):
    """A table of the run's scores, if they are of this checkpoint."""
    results = run_folder.read_results(file)
    if Path(str(results.get("checkpoint", ""))).name != checkpoint:
        return []
    scores = {}
    for key, value in results.items():
        part, _, metric = key.partition("_")
        if part in ("eval", "test") and isinstance(value, int | float):
            scores.setdefault(metric, {})[part] = f"{value:.4f}" if isinstance(value, float) else value
    parts = [part for part in ("eval", "test") if any(part in each for each in scores.values())]
    if not parts:
        return []
    heads = {"eval": "validation", "test": "test"}
    lines = [f"| metric | {' | '.join(heads[part] for part in parts)} |", "|---|" + "---:|" * len(parts)]
    lines += [
        f"| {metric} | {' | '.join(str(each.get(part, '')) for part in parts)} |" for metric, each in scores.items()
    ]
    return ["## Scores", "", *lines, ""]


def node_hours(file, step):
    """Hosts times hours that the run whose events.jsonl is `file` took to reach `step`, all its starts added up.

    None where the file is not there. A start ends with the last event that it left at that step or before.
    """
    if not file.is_file():
        return None
    total = 0.0
    for _, some in itertools.groupby(records.Events(file), key=lambda event: event["restart"]):
        some = list(some)
        first, hosts = some[0], len(some[0].get("hosts", [None]))
        last = [event for event in some if event.get("step", 0) <= step][-1:]
        total += hosts * (last[0]["time"] - first["time"] if last else 0.0)
        if any(event["event"] == "checkpoint" and event.get("step", 0) >= step for event in some):
            break
    return total / 3600

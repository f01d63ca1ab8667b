"""A model as an ONNX graph, for runtimes other than PyTorch, and the proof that it says the same.

Files, inputs and outputs have the names that Optimum gives them. onnx and onnxscript, an extra, are needed here alone,
and so is onnxruntime, which checks the graph where it is installed.
"""

import contextlib
import importlib.util
import inspect
import logging
import sys
import warnings

import torch

from . import checkpoint, model
from .data import tokenizer
from .errors import DataError, UsageError
from .tasks import TASKS

NAME, DATA = "model.onnx", "model.onnx_data"
OPSET = 18  # the one that torch's exporter has its operators in
TOLERANCE = 1e-4  # of the largest number that the model gives, or of 1 where that is smaller
_ONE_FILE = 2 * 10**9  # bytes: protobuf has no more than 2 GiB in one
# Names of outputs and of numbers of tokens, where they are others than "logits" and "sequence_length".
_OUTPUTS = {
    "question_answering": ["start_logits", "end_logits"],
    "seq2seq_lm": ["logits", "encoder_last_hidden_state"],
}
_LENGTHS = {"decoder_input_ids": "decoder_sequence_length"}
# Rows and tokens of what the graph is made from, and of what it is checked with: that, and the length of training.
_TRACED, _CHECKED = (2, 4), (3, 5)
_LONGEST = 1024  # as far as that is tried: all products of a row's tokens are in memory at once


def check(dtype):
    """Raise UsageError where no graph could be written beside weights of `dtype`."""
    if dtype != "fp32":
        raise UsageError(f"--onnx writes a graph in fp32, which is another model than weights in {dtype}; export twice")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--onnx needs {' and '.join(missing)}: pip install 'hpcllm[onnx]'")


@torch.no_grad()
def write(folder, task, hidden):
    """Write the model of the checkpoint `folder` as a graph into the folder `hidden` (Paths), and compare them.

    The whole model is in memory. Returns {"opset", "inputs": names, "outputs": names, "largest_difference": as
    TOLERANCE counts}. Raises DataError for a model that torch cannot export, and for a graph that says something else.
    """
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    print(f"export: writing {NAME}, and comparing what it says with the model", file=sys.stderr, flush=True)
    net, words = model.load(folder, task).eval(), model.vocabulary(tokenizer.load(folder))
    net.set_attn_implementation("eager")  # what SDPA does may depend on what is in a mask
    for part in net.modules():
        if hasattr(part, "config"):  # T5's decoder has one of its own
            part.config.use_cache = False
    kind, outputs = net.config.model_type, _OUTPUTS.get(task, ["logits"])
    given = _arguments(net, task, words, *_TRACED)
    with _refusing(f"{kind} models cannot be exported to ONNX"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.onnx.export(
            net,
            kwargs=given,
            dynamo=True,
            verbose=False,  # None prints as well
            opset_version=OPSET,
            output_names=outputs,
            dynamic_shapes={name: {0: "batch_size", 1: _LENGTHS.get(name, "sequence_length")} for name in given},
        ).model
    ClearMetadataAndDocStringPass()(graph)  # lines of code with the names of this machine's folders
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    onnx_ir.save(graph, hidden / NAME, external_data=DATA if weights > _ONE_FILE else None)
    length = checkpoint.read_state(folder)["config"]["train"]["sequence_length"]
    with _refusing(f"the ONNX graph of this {kind} model does not run"):
        session = _session(hidden / NAME)
        tried = [_arguments(net, task, words, *shape) for shape in (_CHECKED, (1, min(length, _LONGEST)))]
        difference = max(_difference(net, session, outputs, given) for given in tried)
    if difference > TOLERANCE:
        raise DataError(
            f"the ONNX graph of this {kind} model says something else than the model: {difference:.2g} of its largest "
            f"number lie between them, where {TOLERANCE:g} may"
        )
    return {"opset": OPSET, "inputs": list(given), "outputs": outputs, "largest_difference": difference}


def _arguments(net, task, words, rows, length):
    """{input of the graph: int64 [rows, tokens]}: those of training, with random tokens, the last ones padding.

    And token_type_ids where the tokenizer gives them, but for tasks that are learnt without; text in one piece has
    zeros, which is what models make of none.
    """
    draw, place = torch.Generator().manual_seed(length), torch.arange(length)
    mask = (place < (length - 1 - torch.arange(rows)).clamp(min=1).unsqueeze(1)).long()
    tokens = torch.randint(words.size, (rows, length), generator=draw).masked_fill(mask == 0, words.padding)
    given = {"input_ids": tokens, "attention_mask": mask}
    known = inspect.signature(net.forward).parameters
    if words.segments and "token_type_ids" in known and task not in ("causal_lm", "dialogue"):
        given["token_type_ids"] = (place % (getattr(net.config, "type_vocab_size", 0) or 1)).repeat(rows, 1)
    labels = torch.randint(words.size, (rows, max(1, length - 1)), generator=draw)
    given = TASKS[task].inputs(given, labels, net.config)
    return {name: value for name, value in given.items() if torch.is_tensor(value)}


def _session(path):
    """What runs the graph in the file `path`: `run([output], {input: array})` returns arrays."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # by itself it binds threads to cores that others may have
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _difference(net, session, outputs, given):
    """The largest between what both make of `given`, as TOLERANCE counts; infinite where there is no number."""
    expected, largest = net(**given), 0.0
    found = session.run(outputs, {name: value.numpy() for name, value in given.items()})
    for name, numbers in zip(outputs, found, strict=True):
        apart = (torch.as_tensor(numbers) - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1)
        largest = max(largest, apart.nan_to_num(torch.inf).item())
    return largest


@contextlib.contextmanager
def _refusing(what):
    """Whatever torch and runtimes raise inside becomes a DataError: each of their parts has exceptions of its own."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # torch says first what to do about it
        why = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise DataError(f"{what}: {why}") from None

"""The command line: `hpcllm COMMAND`, `python -m hpcllm COMMAND`, alone or under mpirun or srun.

Parses arguments and ends the job; the work is in the modules that the commands import when they run, so that
`--help` needs neither MPI nor torch.
"""

import argparse
import json
import os
import sys
import time
import warnings

from . import __version__
from .errors import CannotCreate, Refusal, UsageError
from .mpi import launcher, leave_together

_LABELS = ("sequence_classification", "token_classification")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints come from one process of the job, not from all."""

    def _print_message(self, message, file=None):
        if launcher.speaks():
            super()._print_message(message, file)

    def error(self, message):
        leave_together(UsageError.code, f"{self.format_usage()}hpcllm: error: {message}")


def parser():
    top = Parser(prog="hpcllm", description="Train language models on supercomputers, started by mpirun or srun.")
    top.add_argument("--version", action="version", version=f"hpcllm {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    p = commands.add_parser("prepare", help="text to tokens: a folder of HDF5 shards and a tokenizer")
    p.add_argument("--input", nargs="+", required=True, metavar="FILE_OR_GLOB", help="plain text or JSONL; with --task "
                   "CoNLL columns, TSV, CSV or JSONL; also .gz")  # fmt: skip
    p.add_argument("--output", required=True, metavar="DIR", help="gets train/, validation/ and tokenizer/")
    p.add_argument(
        "--tokenizer", metavar="DIR", help="a tokenizer folder in Hugging Face's layout (default: train one)"
    )
    p.add_argument("--tokenizer-kind", choices=("wordpiece", "bpe"), default="wordpiece", help="(default: %(default)s)")
    p.add_argument("--vocab-size", type=int, default=30522, metavar="N", help="tokens to train (default: %(default)s)")
    p.add_argument("--jsonl-field", metavar="NAME", help="the input is JSONL and this field holds the text")
    p.add_argument(
        "--document-separator",
        choices=("newline", "blank-line"),
        default="newline",
        help="where a document of plain text ends (default: %(default)s)",
    )
    p.add_argument("--validation-fraction", type=float, default=0.0, metavar="F", help="part of the documents held out")
    p.add_argument(
        "--shard-tokens",
        type=int,
        default=1 << 28,
        metavar="N",
        help="tokens a shard, to the end of its last document (default: %(default)s)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    g = p.add_argument_group("labelled data, to fine-tune")
    g.add_argument("--task", choices=_LABELS, help="what the labels are for; without, text is for pre-training")
    g.add_argument("--validation", nargs="+", default=[], metavar="FILE_OR_GLOB", help="examples to choose a model by")
    g.add_argument("--test", nargs="+", default=[], metavar="FILE_OR_GLOB", help="examples to report results of")
    g.add_argument("--format", choices=("conll", "tsv", "csv", "jsonl"), help="(default: by the files' endings)")
    g.add_argument(
        "--text-column", metavar="NAME", help="column or field of the text (default: text; of words 0 or tokens)"
    )
    g.add_argument("--pair-column", metavar="NAME", help="column or field of a second text")
    g.add_argument(
        "--label-column", metavar="NAME", help="column or field of the label (default: label; of words -1 or tags)"
    )
    g.add_argument(
        "--columns", nargs="+", metavar="NAME", help="names of a table's columns, if its first line has none"
    )
    g.add_argument("--labels", nargs="+", metavar="NAME", help="all labels, in order (default: those that occur)")
    g.add_argument("--problem", choices=("single", "multi", "value"), default="single", help="a text's labels: one of "
                   "several names, any of them, or a number (default: %(default)s)")  # fmt: skip
    g.add_argument(
        "--label-separator", default=",", metavar="TEXT", help="between a text's names (default: %(default)s)"
    )
    g.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest example (default: %(default)s)")
    g.add_argument("--truncation", choices=("cut", "drop", "error", "split"), help="of longer ones: lose their end, or "
                   "all, refuse them, or go on in another (default: split sentences of words, cut texts)")  # fmt: skip

    p = commands.add_parser("train", help="train or go on training as a run file says")
    p.add_argument("run_file", metavar="RUN.toml")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.max_steps=5")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    p.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")

    p = commands.add_parser(
        "plan",
        help="what a run file would do on a machine: which layout is the fastest, which rank does what",
        description="With --gpu, --nodes and --gpus-per-node: predict memory, step time, tokens/s and energy of every "
        "layout that the machine allows, and say which [parallel] is the fastest; needs neither job nor GPU. With "
        "--show-mesh: which rank does what on which host, in this job (under mpirun or srun) or one of --nodes x "
        "--ranks-per-node. Refuses what cannot run, before it is queued.",
    )
    p.add_argument("run_file", metavar="RUN.toml")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. parallel.tensor=4")
    p.add_argument("--show-mesh", action="store_true", help="print the ranks by host with their place on each axis")
    p.add_argument("--nodes", type=int, metavar="N", help="hosts of the job to come")
    p.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks on each of them (--show-mesh)")
    p.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs, and so ranks, on each of them (--gpu)")
    p.add_argument(
        "--gpu", metavar="NAME", help="a100, h100, mi250x, ... (one that is not known lists all), cpu: a core"
    )
    p.add_argument("--measured", metavar="FILE", help="what `hpcllm doctor --json` printed, for data sheets")
    p.add_argument("--output", metavar="FILE", help="write the run file with the fastest layout")
    p.add_argument("--overwrite", action="store_true", help="replace that file if it exists")

    p = commands.add_parser(
        "evaluate",
        help="how good a checkpoint is on prepared shards",
        description="Of text: loss, perplexity and accuracy. Of labelled data: the task's metrics, with a table.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT_OR_RUN")
    p.add_argument("--data", metavar="DIR", help="folder of shards (default: the run's validation folder)")
    p.add_argument("--output", metavar="FILE", help="write the scores as JSON")
    p.add_argument("--plot", metavar="FILE", help="labelled data: draw which label was taken for which (matplotlib)")
    p.add_argument("--overwrite", action="store_true", help="replace those files if they exist")

    p = commands.add_parser(
        "predict",
        help="what a model says of texts: fill [MASK], continue, classify, tag, embed",
        description="Of --text answers are printed. Of the rows of --input each gets a line of JSON in --output, in "
        "order and once, whichever rank answers it; a job that was killed goes on where it was, by the same command.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT_OR_RUN_OR_MODEL")
    p.add_argument("--text", action="append", default=[], help="a text (may be repeated)")
    p.add_argument(
        "--input", nargs="+", metavar="FILE_OR_GLOB", help="text, TSV, CSV (first line: names), JSONL, also .gz"
    )
    p.add_argument("--format", choices=("text", "tsv", "csv", "jsonl"), help="of the input (default: by its ending)")
    p.add_argument("--text-column", default="text", metavar="NAME", help="column or field of it (default: %(default)s)")
    p.add_argument("--pair-column", metavar="NAME", help="column or field of a second text")
    p.add_argument("--output", metavar="FILE", help="write the answers as JSONL")
    p.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    p.add_argument("--task", choices=("masked_lm", "causal_lm", "sequence_classification", "token_classification",
                   "embedding"), help="what is asked (default: what the model is for)")  # fmt: skip
    p.add_argument("--precision", choices=("fp32", "bf16"), help="arithmetic (default: that of training)")
    p.add_argument("--batch-tokens", type=int, metavar="N", help="of a batch, padding included (default: by device)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "xpu"), default="auto")
    p.add_argument(
        "--top-k", type=int, metavar="K", help="guesses for each mask (5), labels of a text, tokens to draw from"
    )
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="longest continuation (40)")
    p.add_argument(
        "--temperature", type=float, metavar="T", help="draw continuations, each row by itself (0: the likeliest)"
    )
    p.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this probability (1)")
    p.add_argument("--beams", type=int, metavar="B", help="look for the likeliest continuation with so many (1)")
    p.add_argument("--seed", type=int, metavar="N", help="of what is drawn (0)")
    p.add_argument("--pooling", choices=("mean", "first"), help="embedding: of a text's tokens (mean)")

    p = commands.add_parser(
        "export",
        help="a checkpoint as one model folder in Hugging Face's layout",
        description="Write what other tools load: the model of a checkpoint, which is verified first, as "
        "save_pretrained would, with its tokenizer, without the optimizer. Needs memory for one tensor.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT_OR_RUN")
    p.add_argument("output", metavar="OUTPUT", help="the folder to write")
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="(default: %(default)s)")
    p.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of a weights file: 500MB, 4GiB, ... (default: %(default)s)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the model folder OUTPUT if it exists")

    p = commands.add_parser(
        "doctor",
        help="is this machine fit for a job? What is wrong, with its cure",
        description="Look at launcher, MPI, cores, GPUs, links, clocks, storage and speed of all ranks of this job, "
        "and print a line a finding: ok, warning or FAILURE. Start it as the job will be started.",
        epilog="Exit code: 0 without failures (warnings are none), 69 with a failure, 2 where launcher and MPI do not "
        "know each other.",
    )
    p.add_argument("--folder", default=".", metavar="DIR", help="where the job will read and write (default: here)")
    p.add_argument("--json", action="store_true", help="print findings and all that was measured as JSON")
    p.add_argument("--plot", metavar="FILE", help="draw the bandwidth between hosts (needs matplotlib; replaced)")
    p.add_argument(
        "--exclude-file",
        metavar="FILE",
        help="write hosts with failures on one line, for `sbatch --exclude=$(cat FILE)` (replaced; empty line: none)",
    )
    return top


def prepare(args):
    from . import mpi
    from .data.prepare import prepare

    names = ("output", "tokenizer", "tokenizer_kind", "vocab_size", "jsonl_field", "document_separator")
    names += ("validation_fraction", "shard_tokens", "overwrite")
    _refuse_others(args)
    world = mpi.join()
    if args.task:
        return prepare_labelled(args, world)
    summary = prepare(world, inputs=args.input, **{name: getattr(args, name) for name in names})
    if world.is_root:
        print(json.dumps(summary, indent=2))


# Options of `prepare` that are for one kind of input alone.
_OF_TEXT = ("tokenizer_kind", "vocab_size", "jsonl_field", "document_separator")
_OF_TABLES = ("pair_column", "columns", "problem", "label_separator")
_OF_LABELS = ("validation", "test", "format", "text_column", "label_column", "labels", "max_tokens", "truncation")


def _refuse_others(args):
    """Refuse options of another kind of input than the one that is prepared: they would do nothing."""
    defaults = parser().parse_args(["prepare", "--input", "", "--output", ""])
    if not args.task:
        wrong, why = _OF_LABELS + _OF_TABLES, "is for labelled data; say what they are for: --task"
    elif args.task == "token_classification":
        wrong, why = _OF_TEXT + _OF_TABLES, f"does nothing with --task {args.task}"
    else:
        wrong, why = _OF_TEXT, f"does nothing with --task {args.task}"
    given = [name for name in wrong if getattr(args, name) != getattr(defaults, name)]
    if not given and args.problem == "value" and args.labels:
        given, why = ["labels"], "names labels, and values have no names"
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} {why}").known_to_all()


def prepare_labelled(args, world):
    from .data.labelled import Reading
    from .data.prepare_labelled import prepare_labelled, table

    words = args.task == "token_classification"
    names = ("output", "tokenizer", "validation", "test", "validation_fraction", "label_separator", "max_tokens")
    names += ("shard_tokens", "overwrite")
    columns = args.columns and tuple(args.columns)
    reading = Reading(args.format, args.text_column, args.pair_column, args.label_column, columns, words)
    summary = prepare_labelled(
        world,
        inputs=args.input,
        kind="tags" if words else args.problem,
        reading=reading,
        given_labels=args.labels,
        truncation=args.truncation or ("split" if words else "cut"),
        **{name: getattr(args, name) for name in names},
    )
    if world.is_root:
        print(table(summary), file=sys.stderr)
        print(json.dumps(summary, indent=2, ensure_ascii=False))


def train(args):
    from . import startup

    parts = startup.Parts()
    from . import config, mpi

    world = mpi.join()
    parts.end("mpi")
    settings = mpi.on_root(world.comm, config.load, args.run_file, args.overrides)
    from .train import train

    parts.end("imports")
    world = mpi.init(settings.train.device, settings.parallel.backend)
    parts.end("backend")
    results = train(settings, world, resume=args.resume, overwrite=args.overwrite, parts=parts)
    if world.is_root:
        print(f"done: {json.dumps(results)}")


def plan(args):
    if args.gpu is not None:
        return plan_layout(args)
    from . import config, mpi

    if not args.show_mesh:
        raise UsageError(
            "plan: say what to show: --show-mesh, or the fastest layout, with --gpu, --nodes and --gpus-per-node"
        ).known_to_all()
    if (args.nodes is None) != (args.ranks_per_node is None):
        raise UsageError("plan: give both --nodes and --ranks-per-node, or neither for this job").known_to_all()
    if args.nodes is not None and min(args.nodes, args.ranks_per_node) < 1:
        raise UsageError("plan: --nodes and --ranks-per-node count from 1").known_to_all()
    world = mpi.join()
    settings = mpi.on_root(world.comm, config.load, args.run_file, args.overrides)
    hosts = world.comm.allgather(world.host)
    if args.nodes is not None:
        hosts = [f"node {node}" for node in range(args.nodes) for _ in range(args.ranks_per_node)]

    def drawn():
        from .plan import show_mesh  # imports torch, which only this rank needs

        return show_mesh(settings, hosts)

    text = mpi.on_root(world.comm, drawn)
    if world.is_root:
        print(text)


def plan_layout(args):
    """The fastest layout. MPI is not started: login nodes may not have it; every process comes to the same."""
    from . import config

    try:
        if args.nodes is None or args.gpus_per_node is None or min(args.nodes, args.gpus_per_node) < 1:
            raise UsageError("plan: --gpu needs --nodes and --gpus-per-node, which count from 1")
        settings = config.load(args.run_file, args.overrides)
        check_output(args.output, args.overwrite)
        from . import files
        from .plan import plan

        text, fastest = plan(settings, args.nodes, args.gpus_per_node, args.gpu, args.measured)
        if launcher.speaks():
            print(text)
            if args.output:
                files.write_text(args.output, fastest.toml())
    except Refusal as refusal:
        raise refusal.known_to_all() from None


def check_output(path, overwrite, option="--output"):
    """Refuse a file that is in the way, or a folder that is not there, before the work and not after it."""
    if path is None:
        return
    if os.path.exists(path) and not (overwrite and os.path.isfile(path)):
        raise CannotCreate(f"{option} {path} exists; choose another name or --overwrite")
    if not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
        raise CannotCreate(f"{option} {path}: there is no such folder, or it may not be written to")


def evaluate(args):
    from . import mpi

    world = mpi.join()
    from . import attention, files, model
    from .evaluate import evaluate
    from .metrics import picture
    from .parallel.apply import whole
    from .train import open_source, read_tokenizer, run_config

    for path, option in ((args.output, "--output"), (args.plot, "--plot")):
        mpi.on_root(world.comm, check_output, path, args.overwrite, option)
    settings, folder = mpi.on_root(world.comm, run_config, args.checkpoint)
    data = args.data or settings.data.validation
    if data is None:
        raise UsageError("the run had no validation folder; name one with --data").known_to_all()
    world = mpi.init(settings.train.device, settings.parallel.backend)
    words = mpi.on_root(world.comm, read_tokenizer, folder)
    names = mpi.on_root(world.comm, model.label_names, folder, settings.model.task)
    source = open_source(settings, world, data, words, names)
    with mpi.together(world.comm):
        net = model.load(folder, settings.model.task).to(world.device)
        if settings.data.attention == "document":
            attention.keep_apart(net)
    if args.plot:
        mpi.on_root(world.comm, picture.check, args.plot)
    scores, report = evaluate(whole(net, world), source, settings.train.micro_batch_size, settings.train.precision)
    scores = {"checkpoint": str(folder), "data": str(data), **scores}
    text, matrix = report or (None, None)
    if world.is_root:
        print(*([] if text is None else [text]), json.dumps(scores, indent=2), sep="\n")
    if args.plot and matrix is not None:
        mpi.on_root(world.comm, picture.confusion_picture, matrix, source.meaning["names"], args.plot)
    if args.output:
        mpi.on_root(world.comm, files.write_json, args.output, scores)


_OPTIONS = ("batch_tokens", "top_k", "max_new_tokens", "temperature", "top_p", "beams", "seed", "pooling")


def predict(args):
    from . import mpi

    if not args.text and not args.input:
        raise UsageError("no text: give --text or --input").known_to_all()
    if args.input and (args.text or not args.output):
        raise UsageError("--input has rows, whose answers go to the file --output; --text is printed").known_to_all()
    world = mpi.join()
    from . import files
    from .predict import predict_file, predict_texts, show

    options = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    options |= {"question": args.task, "precision": args.precision}
    if args.input:
        options["columns"] = (args.text_column, args.pair_column) if args.pair_column else (args.text_column,)
        world = mpi.init(args.device)
        how = {"overwrite": args.overwrite, "format": args.format}
        summary = predict_file(world, args.checkpoint, args.input, args.output, **how, **options)
        if world.is_root:
            print(json.dumps(summary, indent=2))
        return
    mpi.on_root(world.comm, check_output, args.output, args.overwrite)
    world = mpi.init(args.device)
    answers = predict_texts(world, args.checkpoint, args.text, **options)
    if args.output:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers or [])
        mpi.on_root(world.comm, files.write_text, args.output, lines)
    elif world.is_root:
        for answer in answers:
            print(show(answer))


def export(args):
    from . import mpi

    world = mpi.join()
    from . import export
    from .train import run_config

    max_shard_bytes = mpi.on_root(world.comm, export.size, args.max_shard_size)
    mpi.on_root(world.comm, export.check, args.output, args.overwrite)
    settings, folder = mpi.on_root(world.comm, run_config, args.checkpoint)
    how = (args.dtype, max_shard_bytes, args.overwrite)
    summary = mpi.on_root(world.comm, export.export, folder, settings.model.task, args.output, *how)
    if world.is_root:
        print(f"done: {json.dumps(summary)}")


def doctor(args):
    from . import mpi

    start = time.monotonic()
    world = mpi.join()
    from . import doctor

    mpi.on_root(world.comm, doctor.check, args.folder, args.plot, args.exclude_file)
    world = mpi.init("cpu")  # GPUs are looked at, also where ranks would have to share one
    facts = doctor.measure(world, args.folder)

    def tell():
        findings = doctor.judge(facts)
        doctor.report(facts, findings, time.monotonic() - start, args.json, args.plot, args.exclude_file)
        return any(finding.level == "failure" for finding in findings)

    if mpi.on_root(world.comm, tell):
        leave_together(doctor.UNFIT)


def main(arguments=None):
    args, rest = parser().parse_known_args(arguments)
    # argparse stops collecting overrides at the first option; key=value may stand anywhere after the run file.
    if args.command in ("train", "plan"):
        args.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    # Nothing of a job reaches for the network; libraries that would are told so before they are imported.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    from . import imports

    imports.remember()
    commands = {
        "prepare": prepare,
        "train": train,
        "plan": plan,
        "evaluate": evaluate,
        "predict": predict,
        "export": export,
        "doctor": doctor,
    }
    try:
        commands[args.command](args)
    except Refusal as refusal:
        if not refusal.agreed:
            raise  # only this rank knows: `mpi.abort` prints the sentence and ends the others
        leave_together(refusal.code, f"hpcllm: error: {refusal}")


if __name__ == "__main__":
    main()

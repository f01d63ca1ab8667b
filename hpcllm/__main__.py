"""The command line: `hpcllm COMMAND`, `python -m hpcllm COMMAND`, alone or under mpirun or srun.

Starts what was asked for and ends the job; the work is in the modules that the commands import when they run, so that
`--help` needs neither MPI nor torch. What can be asked is in `arguments`.
"""

import json
import os
import sys
import time
import warnings

from . import imports
from .arguments import parser
from .errors import CannotCreate, Refusal, UsageError
from .mpi import launcher, leave_together


def prepare(args):
    from . import mpi

    with imports.undisturbed():
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
_OF_TABLES = ("columns",)
_OF_PAIRS = ("pair_column",)
_OF_CLASSES = ("problem", "label_separator")
_OF_NAMES = ("labels",)
_OF_DIALOGUES = ("chat_template",)
_OF_QUESTIONS = ("stride",)
_OF_LABELS = ("validation", "test", "format", "text_column", "label_column", "max_tokens", "truncation")
# What does nothing with a task, beside what is for plain text.
_NOTHING_WITH = {
    "sequence_classification": _OF_DIALOGUES + _OF_QUESTIONS,
    "token_classification": _OF_DIALOGUES + _OF_QUESTIONS + _OF_TABLES + _OF_PAIRS + _OF_CLASSES,
    "question_answering": _OF_DIALOGUES + _OF_TABLES + _OF_CLASSES + _OF_NAMES,
    "seq2seq_lm": _OF_DIALOGUES + _OF_QUESTIONS + _OF_PAIRS + _OF_CLASSES + _OF_NAMES,
    "dialogue": _OF_QUESTIONS + _OF_TABLES + _OF_PAIRS + _OF_CLASSES + _OF_NAMES,
}


def _refuse_others(args):
    """Refuse options of another kind of input than the one that is prepared: they would do nothing."""
    defaults = parser().parse_args(["prepare", "--input", "", "--output", ""])
    if args.task:
        wrong, why = _OF_TEXT + _NOTHING_WITH[args.task], f"does nothing with --task {args.task}"
    else:
        wrong = _OF_LABELS + _OF_TABLES + _OF_PAIRS + _OF_CLASSES + _OF_NAMES + _OF_DIALOGUES + _OF_QUESTIONS
        why = "is for labelled data; say what they are for: --task"
    given = [name for name in wrong if getattr(args, name) != getattr(defaults, name)]
    if not given and args.problem == "value" and args.labels:
        given, why = ["labels"], "names labels, and values have no names"
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} {why}").known_to_all()


def prepare_labelled(args, world):
    with imports.undisturbed():
        from .data.labelled import Reading
        from .data.prepare_labelled import prepare_labelled, table
        from .names import KIND

    names = ("output", "tokenizer", "validation", "test", "validation_fraction", "label_separator", "max_tokens")
    names += ("chat_template", "stride", "shard_tokens", "overwrite")
    kind, columns = KIND.get(args.task, args.problem), args.columns and tuple(args.columns)
    reading = Reading(kind, args.format, args.text_column, args.pair_column, args.label_column, columns)
    summary = prepare_labelled(
        world,
        inputs=args.input,
        reading=reading,
        given_labels=args.labels,
        truncation=args.truncation or ("split" if kind in ("tags", "span") else "cut"),
        **{name: getattr(args, name) for name in names},
    )
    if world.is_root:
        print(table(summary), file=sys.stderr)
        print(json.dumps(summary, indent=2, ensure_ascii=False))


def fetch(args):
    if not launcher.speaks():
        return  # of several processes one is enough, and login nodes may have no MPI
    from .fetch import fetch

    try:
        print(json.dumps(fetch(args.name, args.output, args.revision, args.overwrite), indent=2))
    except Refusal as refusal:
        raise refusal.known_to_all() from None


def train(args):
    from . import startup, stopping

    parts = startup.Parts()
    stopping.listen()
    from . import config, files, mpi

    world = mpi.join()
    parts.end("mpi")
    settings = mpi.on_root(world.comm, config.load, args.run_file, args.overrides)
    mpi.on_root(world.comm, files.require_writable, settings.run.output_dir, "run.output_dir")
    with imports.undisturbed():
        from . import recovery
        from .train import train

    parts.end("imports")
    recovery.check_spares(settings, world)
    world = mpi.init(settings.train.device, settings.parallel.backend, spares=settings.resilience.spares)
    parts.end("backend")
    results = train(settings, world, resume=args.resume, overwrite=args.overwrite, parts=parts)
    code = results.pop("exit_code", 0)
    if mpi.join().is_root:  # ranks may have died
        print(f"{'stopped' if 'stopped' in results else 'done'}: {json.dumps(results)}", flush=True)
    if code or mpi.has_outlived():
        leave_together(code)


def status(args):
    if not launcher.speaks():
        return  # needs no job, and tells the same in each process of one
    from .status import show, status

    try:
        found = status(args.run)
    except Refusal as refusal:
        raise refusal.known_to_all() from None
    print(json.dumps(found, indent=2) if args.json else show(found))


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
        with imports.undisturbed():
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
        with imports.undisturbed():
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
    for path, option in ((args.output, "--output"), (args.plot, "--plot")):
        mpi.on_root(world.comm, check_output, path, args.overwrite, option)
    with imports.undisturbed():
        from . import attention, files, model
        from .evaluate import evaluate
        from .metrics import picture
        from .parallel.apply import whole
        from .run_folder import run_config
        from .sources import open_source, read_tokenizer

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
_OPTIONS += ("ask", "no_answer_above")


def predict(args):
    from . import mpi

    if not args.text and not args.input:
        raise UsageError("no text: give --text or --input").known_to_all()
    if args.input and (args.text or not args.output):
        raise UsageError("--input has rows, whose answers go to the file --output; --text is printed").known_to_all()
    world = mpi.join()
    if not args.input:
        mpi.on_root(world.comm, check_output, args.output, args.overwrite)
    with imports.undisturbed():
        from . import files
        from .predict import predict_file, predict_texts, show

    options = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    options |= {"question": args.task, "precision": args.precision, "tensor": args.tensor}
    if args.input:
        options["columns"] = args.text_column, args.pair_column
        world = mpi.init(args.device)
        how = {"overwrite": args.overwrite, "format": args.format, "reference": args.reference_column}
        summary = predict_file(world, args.checkpoint, args.input, args.output, **how, **options)
        if world.is_root:
            print(json.dumps(summary, indent=2))
        return
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
    with imports.undisturbed():
        from . import export, to_onnx
        from .run_folder import run_config

    max_shard_bytes = mpi.on_root(world.comm, export.size, args.max_shard_size)
    mpi.on_root(world.comm, export.check, args.output, args.overwrite)
    if args.onnx and args.adapter:
        raise UsageError(
            "--onnx draws a whole model, --adapter writes what was learnt alone; export twice"
        ).known_to_all()
    if args.onnx:
        mpi.on_root(world.comm, to_onnx.check, args.dtype)
    settings, folder = mpi.on_root(world.comm, run_config, args.checkpoint)
    how = (args.dtype, max_shard_bytes, args.overwrite, args.onnx, args.adapter)
    summary = mpi.on_root(world.comm, export.export, folder, settings.model.task, args.output, *how)
    if world.is_root:
        print(f"done: {json.dumps(summary)}")


def doctor(args):
    from . import mpi

    start = time.monotonic()
    world = mpi.join()
    with imports.undisturbed():
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
    # Nothing but `fetch` reaches for the network; libraries that would are told so before they are imported.
    offline = "0" if args.command == "fetch" else "1"
    os.environ.update(HF_HUB_OFFLINE=offline, TRANSFORMERS_OFFLINE=offline, TOKENIZERS_PARALLELISM="false")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    imports.remember()
    commands = {
        "prepare": prepare,
        "fetch": fetch,
        "train": train,
        "status": status,
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

"""The command line's words: commands, their options and what these mean. Needs neither MPI nor torch."""

import argparse

from . import __version__, names
from .errors import UsageError
from .mpi import launcher, leave_together


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
                   "CoNLL columns, TSV, CSV, JSONL or SQuAD; also .gz")  # fmt: skip
    p.add_argument("--output", required=True, metavar="DIR", help="gets train/, validation/ and tokenizer/")
    p.add_argument(
        "--tokenizer", metavar="DIR", help="a tokenizer folder in Hugging Face's layout (default: train one)"
    )
    p.add_argument("--tokenizer-kind", choices=("wordpiece", "bpe", "t5"), default="wordpiece", help="to train: for "
                   "BERT, GPT or T5 (default: %(default)s)")  # fmt: skip
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
    g.add_argument(
        "--task", choices=names.OF_EXAMPLES, help="what the labels are for; without, text is for pre-training"
    )
    g.add_argument("--validation", nargs="+", default=[], metavar="FILE_OR_GLOB", help="examples to choose a model by")
    g.add_argument("--test", nargs="+", default=[], metavar="FILE_OR_GLOB", help="examples to report results of")
    g.add_argument("--format", choices=("conll", "tsv", "csv", "jsonl", "squad"), help="(default: by the files' "
                   "endings)")  # fmt: skip
    g.add_argument(
        "--text-column", metavar="NAME", help="column or field of the text (default: text; of words 0 or tokens; of "
        "texts to write source; of dialogues messages or prompt; of questions context)"
    )  # fmt: skip
    g.add_argument(
        "--pair-column", metavar="NAME", help="column or field of a second text (default: none; of questions question)"
    )
    g.add_argument(
        "--label-column", metavar="NAME", help="column or field of the label (default: label; of words -1 or tags; of "
        "texts to write target; of prompts completion; of questions answers)"
    )  # fmt: skip
    g.add_argument(
        "--columns", nargs="+", metavar="NAME", help="names of a table's columns, if its first line has none"
    )
    g.add_argument("--labels", nargs="+", metavar="NAME", help="all labels, in order (default: those that occur)")
    g.add_argument("--problem", choices=("single", "multi", "value"), default="single", help="a text's labels: one of "
                   "several names, any of them, or a number (default: %(default)s)")  # fmt: skip
    g.add_argument(
        "--label-separator", default=",", metavar="TEXT", help="between a text's names (default: %(default)s)"
    )
    g.add_argument("--chat-template", metavar="FILE", help="dialogue: Jinja that writes turns down, or plain (default: "
                   "the tokenizer's own)")  # fmt: skip
    g.add_argument("--stride", type=int, metavar="N", help="question_answering: tokens of a long text that two windows "
                   "share (default: 128, or what there is room for)")  # fmt: skip
    g.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest example (default: %(default)s)")
    g.add_argument("--truncation", choices=("cut", "drop", "error", "split"), help="of longer ones: lose their end, or "
                   "all, refuse them, or go on in another (default: split sentences of words and "
                   "texts that are asked about, cut others)")  # fmt: skip

    p = commands.add_parser(
        "fetch",
        help="a model and its tokenizer from the hub into a folder, on a login node",
        description="The one command that uses a network: Hugging Face's hub, or the mirror that HF_ENDPOINT names. "
        "Takes configuration, tokenizer and weights in safetensors files, and checks them.",
    )
    p.add_argument("name", metavar="OWNER/MODEL")
    p.add_argument("output", metavar="DIR", help="the folder to write")
    p.add_argument("--revision", metavar="NAME", help="a branch, tag or commit (default: the newest)")
    p.add_argument("--overwrite", action="store_true", help="replace that folder if it was fetched before")

    p = commands.add_parser("train", help="train or go on training as a run file says")
    p.add_argument("run_file", metavar="RUN.toml")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.max_steps=5")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    p.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")

    p = commands.add_parser(
        "status",
        help="how far a run is, from its folder: on a login node, without MPI",
        description="Step, loss, rate and how long it will still take, newest checkpoint, starts and goodput (seconds "
        "of steps that count / seconds since the first start), and whether the run is alive.",
    )
    p.add_argument("run", metavar="RUN", help="run.output_dir of the run file")
    p.add_argument("--json", action="store_true", help="the same as JSON")

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
        help="what a model says of texts: fill [MASK], continue, rewrite, reply, classify, tag, find answers, embed",
        description="Of --text answers are printed. Of the rows of --input each gets a line of JSON in --output, in "
        "order and once, whichever rank answers it; a job that was killed goes on where it was, by the same command.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT_OR_RUN_OR_MODEL")
    p.add_argument("--text", action="append", default=[], help="a text (may be repeated)")
    p.add_argument(
        "--input",
        nargs="+",
        metavar="FILE_OR_GLOB",
        help="text, TSV, CSV (first line: names), JSONL, also .gz; or a folder of shards that `prepare --task` wrote",
    )
    p.add_argument("--format", choices=("text", "tsv", "csv", "jsonl"), help="of the input (default: by its ending)")
    p.add_argument(
        "--text-column", metavar="NAME", help="column or field of it (default: text; with a question context)"
    )
    p.add_argument(
        "--pair-column", metavar="NAME", help="column or field of a second text, or of a question (default: question)"
    )
    p.add_argument("--output", metavar="FILE", help="write the answers as JSONL")
    p.add_argument(
        "--reference-column", metavar="NAME", help="column or field of the text that was wanted: adds BLEU and ROUGE"
    )
    p.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    p.add_argument("--task", choices=(*names.TASKS, "embedding"), help="what is asked (default: what the model is for)")
    p.add_argument("--precision", choices=("fp32", "bf16"), help="arithmetic (default: that of training)")
    p.add_argument("--batch-tokens", type=int, metavar="N", help="of a batch, padding included (default: by device)")
    p.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="ranks that hold the model between them (default: 1)"
    )
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
    p.add_argument("--ask", metavar="TEXT", help="question_answering: the question, where texts come without")
    p.add_argument("--no-answer-above", type=float, metavar="D", help="question_answering: say that there is none "
                   "where its logits exceed the answer's by more (never)")  # fmt: skip
    p.add_argument("--pooling", choices=("mean", "first"), help="embedding: of a text's tokens (mean)")

    p = commands.add_parser(
        "export",
        help="a checkpoint as one model folder in Hugging Face's layout",
        description="Write what other tools load: the model of a checkpoint, which is verified first, as "
        "save_pretrained would, with its tokenizer, without the optimizer. Needs memory for one tensor, with "
        "--onnx for the whole model.",
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
    p.add_argument("--onnx", action="store_true", help="also write model.onnx, checked (fp32; needs hpcllm[onnx])")
    p.add_argument(
        "--adapter", action="store_true", help="of a run with [lora]: what was learnt alone, for PEFT (default: added)"
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

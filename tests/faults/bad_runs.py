"""Bad inputs of the rows about run files, command lines and output folders."""

import ast
import os
import resource
import stat
import subprocess

import tomli_w

from hpcllm import config, files, run_file

from .rows import ROOT, RUN, all_refused, digests, refusal, row


def overridden(place, *words):
    """`config.load` of the good run file with words of a command line."""
    values = {**RUN, "run": {"output_dir": str(place.out)}, "data": {"train": str(place.train_data)}}
    path = place.here / "good.toml"
    path.write_text(tomli_w.dumps(values))
    return config.load(path, words)


def refused_words(place, cases):
    return all_refused([(2, says, overridden, place, word) for word, says in cases])


@row(1, "unknown or misspelt key")
def unknown_key(place):
    path = place.here / "run.toml"
    path.write_text(tomli_w.dumps({**RUN, "run": {"output_dir": str(place.out)}, "data": {"train": "x"}, "tarin": {}}))
    done = place.command("train", path)
    sentence = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    holds, says = refused_words(
        place,
        [
            ("train.lerning_rate=1", 'unknown key "lerning_rate" (did you mean "learning_rate"?)'),
            ("chekpoint.keep=1", 'unknown key "chekpoint" (did you mean "checkpoint"?)'),
        ],
    )
    command = done.returncode == 2 and 'unknown key "tarin" (did you mean "train"?)' in done.stderr
    return holds and command, f"command: {done.returncode}: {sentence}; {says}"


@row(2, "wrong type, `1e-5`, negative, inf, huge number")
def wrong_values(place):
    number = overridden(place, 'train.learning_rate="1e-5"').train.learning_rate
    holds, says = refused_words(
        place,
        [
            ("train.max_steps=many", "train.max_steps"),
            ("train.max_steps=2.5", "train.max_steps"),
            ("train.max_steps=true", "not true or false"),
            ("train.learning_rate=-1", "greater than 0"),
            ("train.learning_rate=inf", "finite"),
            ("train.learning_rate=nan", "train.learning_rate"),
            ("train.max_steps=99999999999999999999", "at most 63 bits"),
            ("train.max_steps=0x" + "f" * 5000, "at most 63 bits"),
            ("run.seed=-1", "greater than or equal to 0"),
            ("data.train=5", "data.train"),
            ("model.config.hidden_size=1979-05-27", "a date"),
        ],
    )
    return holds and number == 1e-5, f'"1e-5" is {number}; {says}'


@row(3, "duplicate key, BOM, UTF-16, non-UTF-8, empty, huge, nested without end")
def not_toml(place):
    path = place.here / "run.toml"

    def read(content):
        path.write_bytes(content)
        return run_file.read(path)

    bom = read(b'\xef\xbb\xbf[run]\noutput_dir = "a"\n') == {"run": {"output_dir": "a"}}
    holds, says = all_refused(
        [
            (2, "is not TOML", read, b"[run]\nseed = 1\nseed = 2\n"),
            (2, "is not TOML", read, b"[run]\n[run]\n"),
            (2, "is UTF-16", read, "[run]".encode("utf-16")),
            (2, "is not UTF-8: byte 0xe9 in line 2", read, b'[run]\noutput_dir = "\xe9"\n'),
            (2, "is empty", read, b""),
            (2, "is larger than 1 MiB", read, b"#" * (2 << 20)),
            (2, "nested too deeply", read, b"x = " + b"[" * 100_000),
            (2, "nested too deeply", read, b"x = " + b"{a = " * 100_000),
            (2, "nested too deeply", read, b".".join([b"a"] * 5000) + b" = 1"),
            (2, "is not TOML", read, b"x = " + b"9" * 5000),
            (2, "is not TOML", read, b"x = !!python/object/apply:os.system ['true']"),
            (2, "is larger than 1 MiB", run_file.read, "/dev/zero"),
            (2, "is a folder", run_file.read, place.here),
            (66, "does not exist", run_file.read, place.here / "none.toml"),
        ]
    )
    return holds and bom, says


@row(4, "override of a key that is not there, of an element of a list")
def bad_override(place):
    return refused_words(
        place,
        [
            ("train.steps=1", 'unknown key "steps"'),
            ("steps=1", "not of the form section.key=value"),
            ("train.max_steps", "not of the form section.key=value"),
            ("train..max_steps=1", "not of the form section.key=value"),
            ("model.freeze.0=x", "model.freeze"),
            ("train.max_steps.deep=1", "max_steps"),
            ("run.seed=1\nrun.output_dir=/", "run.seed"),
            ("run.output_dir=a\udcff", "is not UTF-8"),
        ],
    )


@row(5, "batch not divisible, micro-batch 0, steps 0, more warm-up than steps")
def impossible_numbers(place):
    holds, says = refused_words(
        place,
        [
            ("train.micro_batch_size=3", "global_batch_size (4) is not a multiple of micro_batch_size (3)"),
            ("train.micro_batch_size=0", "greater than or equal to 1"),
            ("train.max_steps=0", "greater than or equal to 1"),
            ("train.warmup_steps=5", "warmup_steps (5) is more than max_steps (4)"),
        ],
    )
    code, sentence = refusal(overridden(place).train.accumulation, 3)
    return holds and code == 2 and "x 3 ranks = 6" in sentence, f"{says}; {code}: {sentence}"


@row(6, "path with blanks, line break, `;`, `$( )`, letters beyond ASCII")
def odd_paths(place):
    folder = place.here / "a b; $(touch pwned) 'é 東"
    folder.mkdir()
    path = folder / "run;touch pwned.toml"
    values = {**RUN, "run": {"output_dir": str(folder / "ein Lauf")}, "data": {"train": str(folder / "none")}}
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    script = f'here={ROOT}/slurm; source "$here/site.sh"; other_launcher=(env); launch "$@"'
    words = ["python3", "-c", "import sys; print(sys.argv[1])", str(path)]
    done = subprocess.run(["bash", "-c", script, "job", *words], cwd=folder, capture_output=True, text=True)
    handed_on = done.stdout.splitlines()[-1:] == [str(path)]
    ran = [found for found in place.here.rglob("pwned*") if found != path]
    code, sentence = refusal(place.train, output=folder / "ein Lauf", data=folder / "none")
    kept = code == 66 and str(folder / "none") in sentence
    holds, says = refused_words(
        place, [('run.output_dir="a\\nb"', "no line breaks"), ('data.train="a\\u0007"', "no line breaks")]
    )
    return holds and handed_on and not ran and kept, f"handed on whole by the job scripts, nothing ran; {says}"


@row(31, "the output folder exists with another run")
def output_exists(place):
    other = place.here / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    run = place.a_run()
    before = digests(place.here)
    holds, says = all_refused(
        [
            (73, "holds a run already (newest checkpoint: checkpoint-4)", lambda: place.train(output=run)),
            (73, "is not empty and holds no run", lambda: place.train(output=other)),
            (73, "is not empty and holds no run", lambda: place.train(output=other, overwrite=True)),
            (73, "is a file", lambda: place.train(output=other / "thesis.tex")),
            (73, "exists; give another name", lambda: place.prepare(run)),
        ]
    )
    code, sentence = refusal(place.prepare, other, overwrite=True)
    return holds and code == 73 and digests(place.here) == before, f"{says}; {code}: {sentence}"


@row(30, "the disk is full")
def disk_full(place):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (place.here / "runs").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond fails with "File too large"
    try:
        told = [
            refusal(place.prepare, place.here / "data"),
            refusal(lambda: place.train(output=place.here / "runs" / "a")),
            refusal(files.write_text, place.here / "big.txt", "x" * 200_000),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = (path for path in place.here.rglob("*") if path.is_file() and path.name != "lock")
    left = [path for path in found if path.suffix not in (".toml", ".jsonl")]
    codes = [code for code, _ in told]
    return codes == [74, 74, 74] and not left, f"exit codes {codes}, {len(left)} files left; {told[1][1]}"


@row(36, "`/tmp/fixed-name`")
def fixed_names(place):
    fixed = []
    for path in sorted((ROOT / "hpcllm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text.startswith("/tmp/") or (text.startswith("/dev/shm/") and len(text) > 9):
                fixed.append(f"{path.name}: {text}")
    before = os.umask(0)  # everything would be open to all
    try:
        hidden = files.hidden_folder(place.here / "folder")
        mode = stat.S_IMODE(hidden.stat().st_mode)
    finally:
        os.umask(before)
    other = files.hidden_folder(place.here / "folder")
    return mode == 0o700 and hidden != other and not fixed, f"no fixed names; what is written has mode {mode:o}"

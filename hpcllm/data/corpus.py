"""The English reference text that ships with CPython, as JSON lines: a small corpus that every machine has.

    python -m hpcllm.data.corpus --output FILE.jsonl

Documents are the pydoc topics and, for each module of the standard library, its docstrings in source order. The
sources are parsed, never imported. Only the standard library of the running interpreter is read, so the corpus is
the same in every run on a machine, and nearly the same on others. For demonstrations and tests.
"""

import argparse
import ast
import json
import os
import sys
import sysconfig
import tempfile
import warnings

from ..errors import CannotCreate, IOFailure, MissingInput, Refusal

# Tests and vendored or generated code: little prose, or not part of every installation.
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_MIN_CHARACTERS = 200


def collect(folder=None):
    """Yield the documents (str) of the standard library in `folder` (default: this interpreter's), in a fixed order."""
    folder = folder or sysconfig.get_paths()["stdlib"]
    topics = os.path.join(folder, "pydoc_data", "topics.py")
    if not os.path.isfile(topics):
        raise MissingInput(f"corpus: this Python has no {topics}; install its standard library's documentation data")
    yield from _topics(topics)
    for path in _sources(folder):
        text = "\n\n".join(_docstrings(path))
        if len(text) >= _MIN_CHARACTERS:
            yield text


def _topics(path):
    with open(path, encoding="utf-8") as file:
        module = ast.parse(file.read())
    for statement in module.body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == "topics":
            yield from (text.strip() for _, text in sorted(ast.literal_eval(statement.value).items()))


def _sources(folder):
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        yield from (os.path.join(root, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path):
    """The docstrings of a module, its classes and functions in source order, without their indentation."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the library's own sources
            module = ast.parse(file.read())
    except (SyntaxError, ValueError):
        return  # templates and deliberately broken files
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(module) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node, clean=True):
            # Half of a surrogate pair has no place in UTF-8.
            yield text.encode("utf-8", "replace").decode("utf-8")


def write(output, *, overwrite=False):
    """Write the corpus to the file `output`, complete or not at all; returns (documents, bytes)."""
    if os.path.lexists(output) and not overwrite:
        raise CannotCreate(f"corpus: {output} exists; give another name or --overwrite")
    if os.path.isdir(output):
        raise CannotCreate(f"corpus: {output} is a folder")
    count = size = 0
    partial = None
    try:
        folder = os.path.dirname(os.path.abspath(output))
        os.makedirs(folder, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{os.path.basename(output)}.", dir=folder)
        with os.fdopen(handle, "wb") as file:
            for text in collect():
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                count, size = count + 1, size + len(line)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, output)
        partial = None
    except OSError as error:
        raise IOFailure(f"corpus: {output}: {error.strerror}") from None
    finally:
        if partial is not None:
            os.unlink(partial)
    return count, size


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m hpcllm.data.corpus", description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.jsonl if it exists")
    options = parser.parse_args(arguments)
    try:
        count, size = write(options.output, overwrite=options.overwrite)
    except Refusal as refusal:
        print(f"hpcllm: error: {refusal}", file=sys.stderr)
        return refusal.code
    print(f"{count} documents, {size / 1e6:.2f} MB of text in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

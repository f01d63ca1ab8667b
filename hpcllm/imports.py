"""Imports that take less time, of each process.

transformers without a look into each of its files: what it finds out about itself at import is kept. Importing it (5.x)
reads the 1600 files of its models, twice, for the names that they define: of the files that a job opens at its start
these are nearly half, and on a parallel file system all ranks ask one server for them. They say the same every time, so
the answer is kept in the user's cache folder ($XDG_CACHE_HOME or ~/.cache), by version and place of transformers; where
it cannot be kept, at least one look is enough.

And without scipy, which transformers imports with each model, where it is installed, for losses of object detection.

And without Python's garbage collector: of the 600,000 objects that torch and transformers are made of there is nothing
to collect, and to look through all of them takes a quarter of a second: six times at the start, now and then in
training, and twice at the end.
"""

import contextlib
import gc
import hashlib
import importlib.machinery
import json
import os
import socket
import sys
from pathlib import Path

_MODULE = "transformers.utils.import_utils"
_under_way = []  # imports that are `undisturbed`


def cache_folder():
    """The user's folder for what is worth keeping from job to job. Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpcllm"


@contextlib.contextmanager
def undisturbed():
    """Around imports: what is there at the end is left alone by the garbage collector, for good."""
    gc.disable()
    _under_way.append(True)
    try:
        yield
    finally:
        _under_way.pop()
        gc.freeze()
        gc.enable()


def remember():
    """From now on importing transformers does as above. Without effect where it is imported already."""
    if _MODULE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds one module as Python does, and has its function replaced once it has run."""

    def find_spec(self, name, path, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                if callable(getattr(module, "define_import_structure", None)):
                    module.define_import_structure = _Structure(module)
                if callable(has_scipy := getattr(module, "is_scipy_available", None)):
                    module.is_scipy_available = lambda: not _under_way and has_scipy()

            spec.loader.exec_module = exec_module
        return spec


class _Structure:
    """`define_import_structure` of transformers, which remembers what it says of all models together."""

    def __init__(self, module):
        self._asked, self._known = module.define_import_structure, None
        self._models = Path(module.__file__).parent.parent / "models"

    def __call__(self, module_path, prefix=None):
        path = Path(module_path)
        if (path.parent if path.name == "__init__.py" else path) != self._models:
            return self._asked(module_path, prefix)
        if self._known is None:
            self._known = self._kept()
        return {
            backends: {f"{prefix}.{name}" if prefix else name: set(objects) for name, objects in modules.items()}
            for backends, modules in self._known.items()
        }

    def _kept(self):
        """{frozenset of backends: {module: names}} from the cache, or as transformers says, which goes there."""
        try:
            if not {"site-packages", "dist-packages"} & set(self._models.parts):
                return self._asked(str(self._models))  # somebody may be at work on it
            key = f"{self._models} {os.stat(self._models).st_mtime_ns} {_version()}"
            file = cache_folder() / f"transformers-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
            kept = json.loads(file.read_text(encoding="utf-8"))
            return {frozenset(backends): dict(modules) for backends, modules in kept}
        except (OSError, ValueError, TypeError):
            found = self._asked(str(self._models))
        except (RuntimeError, ImportError):  # a user without a home; a package that nothing is known about
            return self._asked(str(self._models))
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
            listed = [[sorted(to), {name: sorted(of) for name, of in modules.items()}] for to, modules in found.items()]
            new.write_text(json.dumps(listed), encoding="utf-8")
            new.replace(file)
        return found


def _version():
    from importlib.metadata import version

    return version("transformers")

"""torch.compile of a model's repeated layers, each by itself: alike ones share code, and what is between them stays.

Weights keep their names, and hooks of FSDP2 run between compiled parts as they do between modules.
"""

import os
import stat
import tempfile
from pathlib import Path

import torch

from ..errors import UsageError
from .sharding import blocks


def require(device):
    """Raise UsageError where torch.compile has not what it needs on `device`: a C++ compiler, Triton, a folder."""
    unlike = int.from_bytes(os.urandom(6))  # any before, so that no cache answers for the compiler
    try:
        _keep_apart()
        torch.compile(lambda numbers: numbers.sin() + unlike)(torch.ones(8, device=device))
    except Exception as error:
        why = str(error).strip().splitlines()[0]
        raise UsageError(f"train: compile: torch.compile does not work on this host ({why}); set it to false") from None


def _keep_apart():
    """Have Inductor, which unpickles what it finds there, keep compiled code where no other user can have put any."""
    from torch._inductor import config  # takes a second
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    default = Path(default_cache_dir())
    if not _own(default):
        config.cpp_cache_precompile_headers = False  # which would be there, whatever is asked for
    # torch has set the variable to its own default when it was imported.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(default)) != str(default):
        return
    folder = Path(tempfile.gettempdir()) / f"hpcllm-inductor-{os.getuid()}"
    if not _own(folder):
        folder = tempfile.mkdtemp(prefix="hpcllm-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _own(folder):
    """Whether the folder, made if there is none, is this user's, and nobody else may write into it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def compile_blocks(model):
    """Have each block of `model` compiled when it first runs, in place."""
    # Blocks are the pieces that gradients come in; DDP need not have them cut further, and it cannot cut recomputation.
    torch._dynamo.config.optimize_ddp = False
    _keep_apart()
    for block in blocks(model):
        block.compile()

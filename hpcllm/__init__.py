"""hpcllm: the MPI-native batch framework for large language models on supercomputers."""

import os

if os.environ.get("HPCLLM_MALLOC") != "default":
    # Large tensors lie in large pages, where the system gives them to those who ask; see mpi.device.keep_memory. torch
    # looks when it makes its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

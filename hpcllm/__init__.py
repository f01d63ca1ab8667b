"""hpcllm: the MPI-native batch framework for large language models on supercomputers."""

__version__ = "0.1.0"

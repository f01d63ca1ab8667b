"""Measurements that back what hpcllm claims: each module is a command, `python -m benchmarks.NAME --help`."""

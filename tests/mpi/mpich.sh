#!/usr/bin/env bash
# A second MPI for the tests: MPICH from PyPI in .venv-mpich, apart from .venv (one environment holds one libmpi).
#   tests/mpi/mpich.sh                      install it, once
#   tests/mpi/mpich.sh COMMAND [ARG...]     ... and run COMMAND with its mpirun and its libmpi, e.g.
#   tests/mpi/mpich.sh mpirun -np 3 .venv/bin/python -m pytest -q -m mpi tests/mpi
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
target=$here/.venv-mpich
python=$here/.venv/bin/python

if [ ! -e "$target/.installed" ]; then
    rm -rf "$target"
    "$python" -m venv --without-pip "$target"
    "$python" -m pip --disable-pip-version-check --python "$target/bin/python" install -q 'mpich>=4.3,<6'
    touch "$target/.installed"
fi
[ $# -gt 0 ] || exit 0
export PATH="$target/bin:$PATH" HPCLLM_MPIRUN="$target/bin/mpirun" MPI4PY_LIBMPI="$target/lib/libmpi.so.12"
# More ranks than cores: the tests' own threads would only add to the crowd.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$@"

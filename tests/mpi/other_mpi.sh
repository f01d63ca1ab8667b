#!/usr/bin/env bash
# Other MPIs for the tests, from PyPI, apart from .venv (one environment holds one libmpi): MPICH in .venv-mpich, Intel
# MPI, which is x86-64 alone, in .venv-intel.
#   tests/mpi/other_mpi.sh mpich                      install it, once
#   tests/mpi/other_mpi.sh intel COMMAND [ARG...]     ... and run COMMAND with its mpirun and its libmpi, e.g.
#   tests/mpi/other_mpi.sh mpich mpirun -np 3 .venv/bin/python -m pytest -q -m mpi tests/mpi
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$here/.venv/bin/python
mpi=$1
shift
case $mpi in
    mpich) package='mpich>=4.3,<6' ;;
    intel) package='impi-rt>=2021.18,<2022' ;;
    *) echo "other_mpi.sh: $mpi is neither mpich nor intel" >&2; exit 2 ;;
esac
target=$here/.venv-$mpi

if [ ! -e "$target/.installed" ]; then
    rm -rf "$target"
    "$python" -m venv --without-pip "$target"
    "$python" -m pip --disable-pip-version-check --python "$target/bin/python" install -q "$package"
    touch "$target/.installed"
fi
[ $# -gt 0 ] || exit 0
export PATH="$target/bin:$PATH" HPCLLM_MPIRUN="$target/bin/mpirun" MPI4PY_LIBMPI="$target/lib/libmpi.so.12"
# Intel MPI: where it lies, and no cores for each rank alone, since the tests start more ranks than there are.
export I_MPI_ROOT="$target" I_MPI_PIN=0
# More ranks than cores: the tests' own threads would only add to the crowd.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$@"

#!/usr/bin/env bash
# Builds .venv-mpio: h5py compiled against Debian's parallel HDF5, for the tests of collective reading.
# Everything that needs no compiling (torch, transformers, pytest, hpcllm itself) is taken from .venv by a
# .pth file. Needs root and Debian the first time (about 3 minutes); does nothing when it is built already.
# Not needed to use hpcllm: the wheels' serial h5py writes and reads everything.
#
#   tests/data/parallel_h5py.sh                  build .venv-mpio beside .venv
#   PYTHON=... tests/data/parallel_h5py.sh       with another interpreter than .venv/bin/python
set -euo pipefail

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
cd -- "$repository"
python=${PYTHON:-.venv/bin/python}
venv=.venv-mpio

# The same versions as in .venv, so that the two readers differ in HDF5 alone.
version_of() { "$python" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1"; }

works() {
    [ -x "$venv/bin/python" ] &&
        "$venv/bin/python" -c "
import sys
from importlib.metadata import version
import h5py, mpi4py
assert h5py.get_config().mpi and h5py.__file__.startswith(sys.prefix)
assert [version('h5py'), version('mpi4py')] == sys.argv[1:]
" "$(version_of h5py)" "$(version_of mpi4py)" 2>/dev/null
}

[ -x "$python" ] || { echo "parallel_h5py.sh: $python does not exist; run 'make venv' first" >&2; exit 66; }

missing=()
for package in libhdf5-openmpi-dev libopenmpi-dev openmpi-bin; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" -eq 0 ] || { echo "parallel_h5py.sh: not root, cannot install ${missing[*]}" >&2; exit 77; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if works; then
    echo "parallel_h5py.sh: $venv is built already"
    exit 0
fi

rm -rf -- "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install -q "numpy==$(version_of numpy)" "mpi4py==$(version_of mpi4py)" \
    'setuptools>=77' cython pkgconfig wheel packaging
# Without build isolation h5py compiles against the mpi4py above instead of compiling another.
CC=mpicc.openmpi HDF5_MPI=ON HDF5_DIR="/usr/lib/$(gcc -dumpmachine)/hdf5/openmpi" \
    "$venv/bin/python" -m pip install -q --no-build-isolation --no-binary=h5py --no-deps "h5py==$(version_of h5py)"

# .pth entries come after the venv's own packages, so its h5py, mpi4py and numpy win.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/from_venv.pth"
printf '%s\n' "$repository" >>"$site/from_venv.pth"

works || { echo "parallel_h5py.sh: $venv was built but its h5py has no MPI" >&2; exit 1; }
echo "parallel_h5py.sh: built $venv"

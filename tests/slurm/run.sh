#!/bin/bash
# `make test-slurm`: install the Debian packages that the tests beside this file need, then run them with pytest;
# arguments go on to pytest. Needs root, since it installs packages and makes network namespaces; elsewhere it says
# so and ends with 0. Configures nothing and starts nothing on the machine, but what Debian's munge starts itself.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "test-slurm: skipped: needs root on Debian (this is $(id -un) on $(uname -sr))"
    exit 0
fi
if ! unshare --net --uts --mount true; then
    echo "test-slurm: skipped: root may not make network namespaces here (a container without CAP_SYS_ADMIN?)"
    exit 0
fi

apt() { # apt-get, with fresh package lists if it fails with those there are
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o APT::Sandbox::User=root "$@" >/dev/null 2>&1 && return
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o APT::Sandbox::User=root "$@" >/dev/null
}

# libpmix2 is what `srun --mpi=pmix` loads, under a name that is a link in libpmix-dev; Lua and Tcl are what Lmod and
# Environment Modules are written in.
missing=()
for package in slurm-wlm munge libpmix2 libpmix-dev iproute2 tcl lua5.3 lua-filesystem lua-json lua-posix lua-term; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "test-slurm: installing ${missing[*]}"
    apt install -y --no-install-recommends "${missing[@]}"
fi

# The two module tools exclude each other as Debian packages, so both are unpacked and neither is installed.
tools=$(mktemp -d /tmp/module-tools.XXXXXX)
trap 'rm -rf "$tools"' EXIT
while read -r package own; do
    (cd "$tools" && apt download "$package")
    dpkg -x "$tools/$package"_*.deb "$tools/$package"
    # Their scripts know their own places by absolute paths, which match `own`.
    grep -rlIE "$own" "$tools/$package" | xargs sed -Ei "s#$own#$tools/$package&#g"
done <<'EOP'
environment-modules /(usr/share/modules|usr/lib/[^/ ]+-linux-gnu|etc/environment-modules)
lmod /(usr/share/lmod|usr/lib/lmod|etc/lmod)
EOP

# One cluster at a time: its namespaces have fixed names.
export HPCLLM_TEST_SLURM=1 HPCLLM_MODULE_TOOLS=$tools
flock /run/lock/hpcllm-test-slurm "$python" -m pytest -m slurm tests/slurm "$@"

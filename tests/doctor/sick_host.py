"""A job for the tests in which every rank plays a host of its own, n0, n1, ..., and n1 is as ill as can be.

    mpirun -np 3 python sick_host.py FOLDER EXCLUDE_FILE PICTURE

Prints the doctor's JSON and ends with its exit code. As root, n1 really has another file system at FOLDER and a small
/dev/shm; the rest is put into its measurements.
"""

import ctypes
import sys
import time
from dataclasses import replace

import hpcllm.mpi
from hpcllm import doctor, utilisation
from hpcllm.doctor import job, storage

FOLDER, EXCLUDE_FILE, PICTURE = sys.argv[1:]


def mount_of_its_own(path, size):
    """A new file system at `path` that only this process sees; OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private = 0x20000, 0x40000 | 0x4000  # CLONE_NEWNS, MS_PRIVATE | MS_REC

    def call(function, *arguments):
        if function(*arguments):
            raise OSError(ctypes.get_errno(), f"mount of {path}")

    call(libc.unshare, new_namespace)
    call(libc.mount, None, b"/", None, private, None)
    call(libc.mount, b"none", path.encode(), b"tmpfs", 0, f"size={size}".encode())


def fall_ill():
    try:
        mount_of_its_own(FOLDER, "64m")
        mount_of_its_own("/dev/shm", "8m")
    except OSError as error:
        print(f"not provoked: {error}", file=sys.stderr)
    multiply, terms, look, clock = utilisation.multiply, job.terms, storage.look, time.time
    storage._APPEARS_S = 0.2
    utilisation.multiply = lambda a, b: 20 * multiply(a, b)
    job.terms = lambda rank, size, count, dtype: terms(rank, size, count, dtype) * (2 if "bf" in str(dtype) else 1)
    storage.look = lambda environ: look(environ) | {"hf_home_writable": False}
    time.time = lambda: clock() + 10  # before `mpi.links` is imported, which takes it from here
    hpcllm.__version__ = "0.0.0"


world = hpcllm.mpi.init("cpu")
names = tuple(f"n{rank}" for rank in range(world.size))
world = replace(world, host=names[world.rank], hosts=names, local_rank=0, local_size=1)
if world.rank == 1:
    fall_ill()
facts = doctor.measure(world, FOLDER)


def tell():
    findings = doctor.judge(facts)
    doctor.report(facts, findings, 0.0, as_json=True, plot_file=PICTURE, exclude_file=EXCLUDE_FILE)
    return any(finding.level == "failure" for finding in findings)


if hpcllm.mpi.on_root(world.comm, tell):
    hpcllm.mpi.leave_together(doctor.UNFIT)

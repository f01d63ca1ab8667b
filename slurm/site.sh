# shellcheck shell=bash
# All that differs from one centre to the next. The job scripts beside this file source it and start their ranks
# with the function `launch` of launch.sh. Edit it here, or edit a copy and set HPCLLM_SITE=/path/to/your_site.sh.

# --- Modules: the MPI library and whatever else hpcllm was installed with ---
# module purge
# module load gcc openmpi

# --- What starts a rank on every task of a Slurm job ---
slurm_launcher=(
    srun
    --mpi=pmix         # Open MPI. MPICH and Intel MPI: pmi2, Cray MPICH: cray_shasta. `srun --mpi=list` shows yours
    --cpu-bind=cores   # each rank keeps to its own cores. By hand: --cpu-bind=mask_cpu:0xfe,0xfe00,...
    # --gpus-per-task=1 --gpu-bind=closest   # each rank sees one GPU, the nearest. NCCL wants them all: leave it out
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"   # since 22.05 srun does not take it from the job
    --kill-on-bad-exit=1                          # a rank that dies ends the others
)

# Ranks that are left go on when others die (docs/job_life.md): srun would end them all, Open MPI 5's mpirun does not.
# slurm_launcher=(mpirun --with-ft ulfm --mca coll ^han -np "${SLURM_NTASKS:-1}")

# --- What starts ranks elsewhere: on a workstation, or under another scheduler ---
other_launcher=(mpirun -np "${HPCLLM_RANKS:-4}")
other_probe=(mpirun -np 1 --host)   # NODE COMMAND follow: does a node of the job (PBS_NODEFILE) still answer?

# --- Environment of the ranks ---
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"   # compute nodes have no internet: fail at once, do not wait for it
export TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"
export HDF5_USE_FILE_LOCKING="${HDF5_USE_FILE_LOCKING:-FALSE}"   # locks fail on many parallel file systems
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
# Large pages for what malloc gives out (glibc from 2.35 on): a step on the CPU takes a tenth less.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
# export MPI4PY_LIBMPI=/opt/openmpi/lib/libmpi.so.40   # the MPI library, where mpi4py finds a wrong one
# More tasks than cores, Open MPI: export OMPI_MCA_mpi_yield_when_idle=1   # mpirun knows by itself, srun does not
# Cray, GPUs and MPI:   export MPICH_GPU_SUPPORT_ENABLED=1
#                       export LD_PRELOAD=$CRAY_MPICH_ROOTDIR/gtl/lib/libmpi_gtl_cuda.so   # AMD: libmpi_gtl_hsa.so
# NCCL or RCCL:         export MPICH_GPU_SUPPORT_ENABLED=0   # both at once can hang
#                       export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3 NCCL_NET_GDR_LEVEL=PHB
# Slingshot (libfabric): export FI_CXI_DEFAULT_CQ_SIZE=131072 FI_CXI_RX_MATCH_MODE=software

# --- The same everywhere: nothing to edit from here on ---

ulimit -c 0   # no core files: a thousand ranks write a thousand of them

# The .venv beside the folder of the job script, unless a module or the user's PATH offers hpcllm already.
command -v hpcllm >/dev/null || PATH=$(cd "${here:-.}/.." && pwd)/.venv/bin:$PATH
command -v hpcllm >/dev/null || { echo "site.sh: no hpcllm: run 'make venv' or 'module load hpcllm'" >&2 && exit 2; }

# launch and again. `here` is the folder of the job script, which may use a copy of this file from elsewhere.
# shellcheck source=slurm/launch.sh
source "${here:-$(dirname "${BASH_SOURCE[0]}")}/launch.sh" || exit 2

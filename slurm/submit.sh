#!/bin/bash
# A chain of jobs that train one run, each as long as the queue allows: each waits until the one before it has ended.
#   slurm/submit.sh --chain 5 --nodes=8 --time=24:00:00 slurm/train_bert.sbatch train.max_steps=500000
# What follows --chain N is for sbatch. Prints the numbers of the jobs. For centres where jobs may not queue themselves
# again: elsewhere the job scripts do that. Jobs that find the run finished, or a file STOP in its folder, end at once.
if [ "${1:-}" != --chain ] || ! [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || [ $# -lt 3 ]; then
    echo "usage: slurm/submit.sh --chain N [options of sbatch] JOB_SCRIPT [arguments]" >&2
    exit 2
fi
left=$2 after=
shift 2
while [ "$left" -gt 0 ]; do
    # afterany: a job that was killed, or lost a node, is gone on from as well as one that was saved.
    number=$(sbatch --parsable ${after:+--dependency=afterany:$after} "$@") || exit
    after=${number%%;*} left=$((left - 1))   # a federation prints job;cluster
    echo "$after"
done

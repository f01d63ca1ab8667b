# shellcheck shell=bash
# How the job scripts start their ranks, start them again within the job, and have the job queued again. Sourced by
# site.sh, whose arrays slurm_launcher, other_launcher and other_probe it uses; nothing here differs by centre.
# shellcheck disable=SC2154

# Less than this is not worth another start, in seconds.
relaunch_at_least_s=120

# launch COMMAND...: run COMMAND on every rank, say so in the log, and return the exit code of the whole.
#
# Training with --resume, and predictions, go on where they were. If a rank or a node that died has ended them they are
# started again in the same job, on the nodes that answer: as many as before where HPCLLM_SPARE_NODES (0) of the job's
# nodes were left idle, else fewer. At most HPCLLM_RELAUNCHES (3) times in a row without a new checkpoint.
launch() {
    local command=("$@") allocated alive use rc fruitless=0 starts=0 newest=none before left what guessed began
    array_member || return
    mapfile -t allocated < <(allocated_nodes)
    alive=("${allocated[@]}")
    local wanted=${#allocated[@]}
    missing_nodes=
    if [ "$wanted" -gt 0 ]; then
        wanted=$((wanted - ${HPCLLM_SPARE_NODES:-0}))
        [ "$wanted" -gt 0 ] || { say "HPCLLM_SPARE_NODES=$HPCLLM_SPARE_NODES leaves no node of ${#allocated[@]}" >&2 && return 2; }
    fi
    while :; do
        use=("${alive[@]:0:wanted}")
        guessed='' began=''
        if is_training && can_go_on && { with_ulfm || [ -n "${SLURM_HET_SIZE:-}" ]; }; then
            began=$(ask starts "${command[@]:2}" 2>/dev/null)
        fi
        HPCLLM_LAUNCH=$starts run_on_nodes $starts "${command[@]}"
        rc=$?
        # With --with-ft ulfm, mpirun of Open MPI 5.0 may return 0 for ranks that have all died.
        if [ $rc = 0 ] && [ -n "$began" ] && { [ -n "$guessed" ] || with_ulfm; }; then
            [ "$(ask over "$began" "${command[@]:2}")" != no ] || rc=137
        fi
        # Refused on fewer nodes, such as a layout that does not divide them: the job has to wait for all of them.
        [ $rc = 2 ] && [ $starts -gt 0 ] && [ ${#use[@]} -lt "$wanted" ] && missing_nodes=yes
        if is_a_death $rc && parts_lost; then missing_nodes=yes; fi
        if ! can_go_on || ! is_a_death $rc; then break; fi
        mapfile -t alive < <(answering "${alive[@]}")
        # What is no rank that was killed is an error, which would only come again, or what a dead node has led to.
        if ! was_killed $rc && [ $((${#use[@]} - $(common "${use[*]}" "${alive[*]}"))) = 0 ]; then break; fi
        [ ${#alive[@]} -ge "$wanted" ] || missing_nodes=yes
        before=$newest newest=$(newest_checkpoint)
        [ "$newest" = "$before" ] || fruitless=0
        fruitless=$((fruitless + 1)) starts=$((starts + 1))
        what="exit code $rc, ${#alive[@]} of ${#allocated[@]} nodes answer"
        left=$(ask left 2>/dev/null)
        if [ $fruitless -gt "${HPCLLM_RELAUNCHES:-3}" ]; then
            say "$what; not launched again: HPCLLM_RELAUNCHES=${HPCLLM_RELAUNCHES:-3} without a new checkpoint"
            break
        elif [ ${#allocated[@]} -gt 0 ] && [ ${#alive[@]} = 0 ]; then
            say "$what; not launched again"
            break
        elif [ -n "$left" ] && [ "$left" -lt $relaunch_at_least_s ]; then
            say "$what; not launched again: the job has $left s left"
            break
        elif ! job_runs; then
            say "$what; not launched again: the job is being ended"
            missing_nodes=
            break
        fi
        say "$what; launched again ($fruitless of ${HPCLLM_RELAUNCHES:-3} without a new checkpoint)"
    done
    return $rc
}

# again CODE: have Slurm queue this job again if its run was saved before its end came (exit code 75), or if it needs
# nodes that have died.
again() {
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    [ "$1" = 75 ] || { [ -n "${missing_nodes:-}" ] && { [ "$1" = 2 ] || is_a_death "$1"; }; } || return 0
    echo "$(date +%FT%T) job $(job) is queued again"
    scontrol requeue "$(job)" || echo "launch: not here: to go on, submit the same command again" >&2
}

# ask WHAT ARGUMENTS...: of hpcllm/batch.py, by the Python that hpcllm was installed for.
ask() { "$(dirname "$(readlink -f "$(command -v hpcllm)")")/python" -m hpcllm.batch "$@"; }

say() { echo "$(date +%FT%T) launch: $*"; }

# What Slurm calls this job: of an array the member, not the whole.
job() { echo "${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"; }

# Whether a rank was killed. None of the codes with which hpcllm ends (1: an error, 130: ^C) or a shell says that there
# is no such command. Launchers have different ones: 128 + the signal, the signal (MPICH), 14 (srun, of MPI in the others).
was_killed() { case $1 in 0 | 1 | 2 | 65 | 66 | 69 | 73 | 74 | 75 | 93 | 124 | 126 | 127 | 130) return 1 ;; esac; }

# Whether it may be that a rank or node died, of which 1 and 124 may be what the others ended with.
is_a_death() { [ "$1" = 1 ] || [ "$1" = 124 ] || was_killed "$1"; }

# Whether `command`, the caller's, goes on where it was when it is started again.
can_go_on() { [[ "${command[*]} " = "hpcllm train "*" --resume "* || "${command[*]}" = "hpcllm predict "* ]]; }

with_ulfm() {
    local how=("${other_launcher[@]}")
    [ -z "${SLURM_JOB_ID:-}" ] || how=("${slurm_launcher[@]}")
    [[ " ${how[*]} " = *" ulfm "* ]]
}

is_training() { [ "${command[*]:0:2}" = "hpcllm train" ]; }

# How many of the words $1 are among the words $2.
common() {
    local word found=0
    for word in $1; do case " $2 " in *" $word "*) found=$((found + 1)) ;; esac; done
    echo $found
}

# Nothing where `command`, the caller's, is no training.
newest_checkpoint() { ! is_training || ask newest "${command[@]:2}" 2>/dev/null; }

# Not what Slurm is ending: after scancel, too, ranks end with a signal's code. Yes where nobody can say.
job_runs() {
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    case $(squeue --noheader --jobs "$(job)" --format %T 2>/dev/null) in "" | *RUNNING*) ;; *) return 1 ;; esac
}

# The nodes of this job, one a line; none on a workstation, and none of heterogeneous jobs, whose parts are started as
# they are.
allocated_nodes() {
    if [ -n "${SLURM_HET_SIZE:-}" ]; then
        return
    elif [ -n "${SLURM_JOB_ID:-}" ]; then
        [ -z "${SLURM_JOB_NODELIST:-}" ] || scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null
    elif [ -n "${PBS_NODEFILE:-}" ]; then
        awk '!seen[$0]++' "$PBS_NODEFILE"
    fi
}

# answering NODE...: those that answer, in the same order. Slurm says which it has given up; whether the others do
# is tried out, since it takes minutes to notice a node that has lost its power.
answering() {
    local node state all=("$@") told tried
    [ $# -gt 0 ] || return 0
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        told=$(sinfo -N -h -n "$(commas "$@")" -o "%N %T" 2>/dev/null)
        all=()
        for node in "$@"; do
            state=$(awk -v node="$node" '$1 == node { print $2; exit }' <<<"$told")
            case $state in *'*' | down* | drained | error* | fail | power* | reboot* | unknown*) ;; *) all+=("$node") ;; esac
        done
    fi
    if [ ${#all[@]} -gt 0 ] && ! try "${all[@]}"; then
        tried=$(for node in "${all[@]}"; do { ! try "$node" || echo "$node"; } & done; wait)
        # That none answers, not even the one on which this runs, says something of the trial alone.
        [ -z "$tried" ] || mapfile -t all < <(for node in "${all[@]}"; do grep -Fx "$node" <<<"$tried"; done)
    fi
    [ ${#all[@]} = 0 ] || printf '%s\n' "${all[@]}"
}

# try NODE...: whether a process starts on each of them.
try() {
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        timeout "${HPCLLM_PROBE_S:-60}" srun --overlap --mpi=none --nodes=$# --ntasks=$# --ntasks-per-node=1 \
            --cpus-per-task=1 --nodelist="$(commas "$@")" true
    else
        local node
        for node in "$@"; do timeout "${HPCLLM_PROBE_S:-60}" "${other_probe[@]}" "$node" true || return; done
    fi </dev/null >/dev/null 2>&1
}

commas() { (IFS=, && echo "$*"); }

# run_on_nodes STARTS COMMAND...: on the nodes `use` of the caller, which has `allocated` of them.
run_on_nodes() {
    local starts=$1 some=() nodes=${SLURM_JOB_NODELIST:-$(hostname)} rc machines=
    shift
    [ ${#use[@]} = ${#allocated[@]} ] || nodes=$(commas "${use[@]}")
    some=("${other_launcher[@]}")
    [ -z "${SLURM_JOB_ID:-}" ] || some=("${slurm_launcher[@]}")
    if [ "${some[0]##*/}" = srun ]; then
        if [ -n "${SLURM_HET_SIZE:-}" ]; then
            heterogeneous
        elif [ ${#use[@]} != ${#allocated[@]} ]; then
            local each=${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-${#allocated[@]}} / ${#allocated[@]}))}
            some+=("--nodes=${#use[@]}" "--ntasks=$((${#use[@]} * each))" "--nodelist=$nodes")
        fi
    else
        if [ -z "${SLURM_JOB_ID:-}" ]; then
            # More ranks than cores are welcome. Variables, since each MPI has other options: Open MPI 4, then 5.
            export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
            export PRTE_MCA_rmaps_default_mapping_policy=:OVERSUBSCRIBE PRTE_MCA_hwloc_default_binding_policy=none
        fi
        if [ "$(id -u)" = 0 ]; then
            export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
            export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
        fi
        if [ ${#use[@]} != ${#allocated[@]} ]; then
            local each=1 i
            for i in "${!some[@]}"; do
                case ${some[i]} in
                -n | -np | --np)
                    each=$((some[i + 1] / ${#allocated[@]}))
                    some[i + 1]=$((${#use[@]} * each))
                    ;;
                esac
            done
            if [ -n "${PBS_NODEFILE:-}" ]; then
                machines=$(mktemp) && grep -Fxf <(printf '%s\n' "${use[@]}") "$PBS_NODEFILE" >"$machines"
                some+=(-machinefile "$machines")
            else
                some+=(--host "$(commas "${use[@]/%/:$each}")")
            fi
        fi
    fi
    printf '%s %s, start %s:%s\n' "$(date +%FT%T)" "$nodes" \
        "$((${SLURM_RESTART_COUNT:-0} + 1))$([ "$starts" = 0 ] || echo ", launch $((starts + 1))")" \
        "$(printf ' %q' "${some[@]}" "$@")"
    if [[ " ${some[*]} " = *" --het-group="* ]]; then srun_over_parts "${some[@]}" "$@"; else "${some[@]}" "$@"; fi
    rc=$?
    [ -z "$machines" ] || rm -f "$machines"
    return $rc
}

# Whether Slurm has given up a node of a heterogeneous job.
parts_lost() {
    local part name
    for ((part = 0; part < ${SLURM_HET_SIZE:-0}; part++)); do
        name=SLURM_JOB_NODELIST_HET_GROUP_$part
        [ -n "${!name:-}" ] || continue
        ! sinfo -N -h -n "${!name}" -o %T 2>/dev/null | grep -qE '\*|^(down|drained|error|fail$)' || return 0
    done
    return 1
}

# All parts of a heterogeneous job in one start, with the cores a task that all of them have.
heterogeneous() {
    local part name cores=
    for ((part = 0; part < SLURM_HET_SIZE; part++)); do
        name=SLURM_CPUS_PER_TASK_HET_GROUP_$part
        [ -n "$cores" ] && [ "$cores" -le "${!name:-1}" ] || cores=${!name:-1}
    done
    some+=("--het-group=0-$((SLURM_HET_SIZE - 1))" "--cpus-per-task=$cores")
}

# srun_over_parts COMMAND...: srun over the parts of a heterogeneous job, killed if it does not return though all of its
# ranks have ended. That of Slurm 22.05 does not if two parts end at the same moment: both wait for a thread of the PMIx
# plugin whose end wakes one of them, and no signal but KILL ends it. Its code then is that of what it said of its tasks.
srun_over_parts() {
    local said watcher rc
    said=$(mktemp -d)
    kill_if_done "$said" &
    watcher=$!
    (echo "$BASHPID" >"$said/pid" && exec "$@" 2> >(exec tee "$said/errors" >&2))
    rc=$?
    kill $watcher 2>/dev/null
    if [ -e "$said/killed" ]; then
        rc=$(sed -nE 's/^srun: error: .* tasks? [-0-9,]+: (Exited with exit code ([0-9]+)|.*)$/\2/p' "$said/errors" |
            awk '{ code = $1 == "" ? 137 : $1 } code > most { most = code } END { print most + 0 }')
        # What it said of no task, such as that none could be started.
        [ "$rc" != 0 ] || ! grep -q '^srun: error: ' "$said/errors" || rc=1
        guessed=yes   # the caller's
        say "srun did not return after its ranks had ended and was killed; by what it said of them, exit code $rc"
    fi
    rm -rf "$said"
    return "$rc"
}

# Kill the process of FOLDER/pid when Slurm has known of no rank of this job for half a minute, having known of some, or
# for six minutes: as long as srun may wait, without a word, to start them. Says so by FOLDER/killed.
kill_if_done() {
    local part name jobs=$SLURM_JOB_ID steps without=0 limit=72
    for ((part = 1; part < SLURM_HET_SIZE; part++)); do name=SLURM_JOB_ID_HET_GROUP_$part jobs+=,${!name:-$jobs}; done
    while [ $without -lt $limit ]; do
        sleep "${HPCLLM_STEP_POLL_S:-5}" >/dev/null 2>&1
        kill -0 "$(cat "$1/pid" 2>/dev/null)" 2>/dev/null || return
        steps=$(squeue --noheader --steps --jobs "$jobs" --format %i 2>/dev/null) || continue
        if grep -qE '^[0-9]+\.[0-9]+$' <<<"${steps// /}"; then
            without=0 limit=6
        elif [[ $(grep -iE 'step .*creat' "$1/errors" | tail -n 1) = *retrying* ]]; then
            without=0
        else
            without=$((without + 1))
        fi
    done
    : >"$1/killed"
    kill -KILL "$(cat "$1/pid")"
}

# In a job array: %a in an argument is the member's number, and members that may run at the same time train each in a
# folder of their own, run.output_dir/task-<number>. An array of which one runs at a time (--array=1-10%1) is a chain
# that goes on in one folder. HPCLLM_ARRAY=members|chain decides by hand. Changes `command`, the caller's.
array_member() {
    local argument kind=${HPCLLM_ARRAY:-} folder given=() named='' told
    local member=${SLURM_ARRAY_TASK_ID:-${PBS_ARRAY_INDEX:-${PBS_ARRAYID:-}}}
    [ -n "$member" ] && is_training || return 0
    for argument in "${command[@]}"; do   # the last one counts
        case $argument in run.output_dir=*%a*) named=chain ;; run.output_dir=*) named= ;; esac
    done
    command=("${command[@]//%a/$member}")
    kind=${kind:-$named}                  # of a folder that has been seen to
    if [ -z "$kind" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        told=$(scontrol show job "$(job)" 2>/dev/null || { sleep "${HPCLLM_PROBE_S:-60}" && scontrol show job "$(job)"; })
        [ -n "$told" ] || {
            say "scontrol does not tell whether members of this array run at the same time; HPCLLM_ARRAY=members or chain does" >&2
            return 2
        }
        case " $told " in *" ArrayTaskThrottle=1 "*) kind=chain ;; esac
    fi
    case ${kind:=members} in
    chain) return 0 ;;
    members) ;;
    *) say "HPCLLM_ARRAY=$kind is neither members nor chain" >&2 && return 2 ;;
    esac
    folder=$(ask folder "${command[@]:2}") || return
    for argument in "${command[@]}"; do
        case $argument in --*) [ -z "$folder" ] || given+=("run.output_dir=$folder/task-$member"); folder= ;; esac
        given+=("$argument")
    done
    [ -z "$folder" ] || given+=("run.output_dir=$folder/task-$member")
    command=("${given[@]}")
}

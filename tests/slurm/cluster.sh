#!/bin/bash
# A real Slurm cluster of N nodes on one machine, for tests; needs root, Debian's Slurm, munge and iproute2.
# Each node is a slurmd in a network namespace of its own, with its own host name, address, /etc/hosts and
# /dev/shm, so that MPI sees N hosts which talk TCP. Bridge, addresses and munge key belong to the cluster:
# the machine's own network, /etc and munge are not touched. Not a way to run Slurm for users.
#
#   cluster.sh up N DIR               start nodes n1 ... nN; configuration, state and logs in DIR (no blanks)
#   cluster.sh login DIR COMMAND...   run COMMAND on the cluster's login node (sbatch, scontrol, ...)
#   cluster.sh kill NODE DIR          power failure: NODE says no more, and all its processes are dead
#   cluster.sh cut NODE               network failure: the link of NODE goes down
#   cluster.sh heal NODE DIR          NODE comes back: link up, slurmd started if it is dead
#   cluster.sh down DIR               end everything; also cleans up after a crashed run
#
# One cluster at a time on a machine: the namespaces are called hpcllm-ctl, hpcllm-n1, ...
set -euo pipefail
ctl=hpcllm-ctl
subnet=10.77.0

in_namespace() { # NAMESPACE HOSTNAME DIR COMMAND...: run COMMAND as a process of that host
    local namespace=$1 host=$2 dir=$3
    shift 3
    # Not `ip netns exec`: it mounts /sys anew and slurmd then finds no cgroup tree.
    # shellcheck disable=SC2016  # $1, $2 are the inner shell's
    nsenter --net="/run/netns/$namespace" unshare --uts --mount --propagation private sh -c '
        hostname "$1"
        mount --bind "$2/hosts" /etc/hosts
        mount -t tmpfs tmpfs /dev/shm
        shift 2
        exec "$@"' sh "$host" "$dir" "$@"
}

kill_all() { # NAMESPACE: kill its processes and wait until they are gone
    local _
    for _ in $(seq 100); do
        [ -n "$(ip netns pids "$1" 2>/dev/null)" ] || return 0
        ip netns pids "$1" | xargs -r kill -9 2>/dev/null || true
        sleep 0.05
    done
    echo "cluster.sh: processes of $1 do not die: $(ip netns pids "$1" | tr '\n' ' ')" >&2
    return 1
}

start_node() { # NODE DIR
    mkdir -p "$2/spool/$1" "$2/tmp/$1"
    in_namespace "hpcllm-$1" "$1" "$2" slurmd -N "$1" -f "$2/slurm.conf" </dev/null
}

wait_for_nodes() { # N DIR: until N nodes are idle
    local _
    for _ in $(seq 120); do
        [ "$(SLURM_CONF="$2/slurm.conf" login "$2" sinfo -h -t idle -o %D 2>/dev/null)" = "$1" ] && return 0
        sleep 0.25
    done
    echo "cluster.sh: the nodes did not come up within 30 s; logs in $2/log" >&2
    tail -n 5 "$2"/log/*.log >&2
    return 1
}

login() { # DIR COMMAND...
    local pid
    pid=$(cat "$1/run/slurmctld.pid")
    # shellcheck disable=SC2016  # the inner shell's
    SLURM_CONF=$1/slurm.conf nsenter --target "$pid" --net --uts --mount \
        sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD" "${@:2}"
}

configure() { # N DIR
    cat >"$2/slurm.conf" <<CONF
ClusterName=hpcllm-test
SlurmctldHost=ctl($subnet.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$2/run/munge.socket
StateSaveLocation=$2/state
SlurmctldPidFile=$2/run/slurmctld.pid
SlurmctldLogFile=$2/log/slurmctld.log
SlurmdPidFile=$2/run/%n.pid
SlurmdLogFile=$2/log/%n.log
SlurmdSpoolDir=$2/spool/%n
# The PMIx plugin keeps its sockets in TmpFS: one folder a node, as on real nodes.
TmpFS=$2/tmp/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Most sites have another default than the one that Open MPI needs, so the templates must name theirs.
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
# A dead node is noticed, and a job started, in seconds rather than minutes.
SlurmdTimeout=10
MessageTimeout=5
KillWait=3
# Heterogeneous jobs are started by the backfill scheduler alone, which comes round every 30 s by default.
SchedulerParameters=batch_sched_delay=0,bf_interval=1
# Scratch files of the jobs go with the cluster.
TaskProlog=$2/prolog.sh
# Nodes claim four CPUs whatever the machine has: the tests place two ranks on a node.
SlurmdParameters=config_overrides
NodeName=n[1-$1] CPUs=4 CoresPerSocket=4 RealMemory=1000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

up() { # N DIR
    local n=$1 dir=$2 i
    case $dir in
    *[[:space:]]*) echo "cluster.sh: slurm.conf cannot hold a path with blanks: '$dir'" >&2 && exit 2 ;;
    esac
    down "$dir"
    mkdir -p "$dir"/{state,spool,log,run,tmp}
    dir=$(cd "$dir" && pwd)

    ip netns add $ctl
    ip -n $ctl link set lo up
    ip -n $ctl link add br0 type bridge
    ip -n $ctl addr add $subnet.254/24 dev br0
    ip -n $ctl link set br0 up
    printf '127.0.0.1 localhost\n%s ctl\n' $subnet.254 >"$dir/hosts"
    for i in $(seq "$n"); do
        ip netns add "hpcllm-n$i"
        ip -n $ctl link add "v-n$i" type veth peer name eth0 netns "hpcllm-n$i"
        ip -n $ctl link set "v-n$i" master br0 up
        ip -n "hpcllm-n$i" addr add "$subnet.$i/24" dev eth0
        ip -n "hpcllm-n$i" link set eth0 up
        ip -n "hpcllm-n$i" link set lo up
        echo "$subnet.$i n$i" >>"$dir/hosts"
    done

    configure "$n" "$dir"
    # shellcheck disable=SC2016  # the prolog's
    printf '#!/bin/sh\necho "export TMPDIR=%s/tmp/$SLURMD_NODENAME"\n' "$dir" >"$dir/prolog.sh"
    chmod +x "$dir/prolog.sh"
    (umask 077 && head -c 1024 /dev/urandom >"$dir/run/munge.key")
    # --force: munged wants its folders open to all users; here they are root's.
    in_namespace $ctl ctl "$dir" munged --force --key-file "$dir/run/munge.key" --socket "$dir/run/munge.socket" \
        --pid-file "$dir/run/munged.pid" --log-file "$dir/log/munged.log" --seed-file "$dir/run/munged.seed" \
        </dev/null 2>/dev/null
    in_namespace $ctl ctl "$dir" slurmctld -f "$dir/slurm.conf" </dev/null
    for i in $(seq "$n"); do start_node "n$i" "$dir"; done
    wait_for_nodes "$n" "$dir"
    login "$dir" sinfo
}

down() { # DIR
    local namespace
    for namespace in $(ip netns list | awk '$1 ~ /^hpcllm-(ctl|n[0-9]+)$/ { print $1 }'); do
        kill_all "$namespace"
        ip netns del "$namespace" # its links, bridge and addresses go with it
    done
    # `ip netns add` made this mount when it made the first one.
    if [ -d /run/netns ] && [ -z "$(ls -A /run/netns)" ]; then
        umount /run/netns 2>/dev/null || true
        rmdir /run/netns
    fi
    rm -rf "$1"/{state,spool,run,tmp,hosts,prolog.sh,slurm.conf} # the logs stay
}

case "${1:-} $#" in
"up 3") up "$2" "$3" ;;
"kill 3")
    ip -n $ctl link set "v-$2" down # first, or the kernel would close the connections of the dead in good order
    kill_all "hpcllm-$2"
    ;;
"cut 2") ip -n $ctl link set "v-$2" down ;;
"heal 3")
    ip -n $ctl link set "v-$2" up
    [ -n "$(ip netns pids "hpcllm-$2")" ] || start_node "$2" "$3"
    ;;
"down 2") down "$2" ;;
"login "*)
    shift
    login "$@"
    ;;
*)
    sed -n '7,12s/^# //p' "$0" >&2
    exit 2
    ;;
esac

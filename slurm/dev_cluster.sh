#!/usr/bin/env bash
# A Slurm cluster of pretended nodes on this machine, to try and to test batch scripts on. It needs no root.
#
#   slurm/dev_cluster.sh up [NODES] [FOLDER]    start a controller and NODES nodes (default: 2), named n1, n2, ...
#   slurm/dev_cluster.sh status [FOLDER]        show its nodes and jobs; exit status 1 if it isn't up
#   slurm/dev_cluster.sh down [FOLDER]          end its jobs and its daemons, nothing else, and remove FOLDER
#   slurm/dev_cluster.sh hold [NODES] [FOLDER]  up, then down when standard input ends: with who has started it, killed
#                                               or not
#
# FOLDER (default: $TMPDIR/convneur-slurm-$USER) holds all of it: configuration, key, state, logs. Clusters in different
# folders don't meet. Every node claims GPUs, cores and memory that needn't be there, so that scripts written for a real
# cluster start as they are; what they start then computes on what this machine has.
set -euo pipefail
umask 077
PATH=$PATH:/usr/sbin:/sbin # where Debian puts daemons

GPUS=8
CORES=128
MEMORY_MB=1000000
START_SECONDS=30
END_SECONDS=15

say() { printf 'dev_cluster: %s\n' "$*"; }
die() {
    say "$*" >&2
    exit 1
}

up() {
    require_programs
    check_folder
    if is_up; then
        say "already up in $folder"
    else
        [ ! -e "$folder" ] || down # left by a machine that went down with it
        configure
        if ! { start_daemons && wait_until $START_SECONDS all_idle; }; then
            tail -n 5 "$folder"/*.log >&2
            down >&2
            die "the nodes didn't come up in $START_SECONDS s; the ends of their logs are above"
        fi
        say "$nodes nodes are up in $folder"
    fi
    say "use them in this shell: export SLURM_CONF=$conf"
    say "end them: $0 down $folder"
}

# What has been started must be ended, whatever signals come; nobody may be left to read what is said about it.
hold() {
    trap : HUP INT TERM PIPE
    up </dev/null
    while read -r _ || [ $? -gt 128 ]; do :; done
    down >/dev/null 2>&1
}

status() {
    is_up || die "no cluster is up in $folder; start one: $0 up"
    sinfo --Node --format '%.6N %.10T %.6c %.8G %E'
    squeue
}

down() {
    [ -e "$folder" ] || die "$folder does not exist: nothing to end"
    grep -qs '^ClusterName=convneur-dev$' "$conf" || die "$folder is not a folder of this script; it stays as it is"
    if is_up; then
        squeue --noheader --format %A | xargs --no-run-if-empty scancel
        wait_until $END_SECONDS no_jobs || say "some jobs didn't end in $END_SECONDS s and are killed" >&2
    fi
    daemons | end_processes TERM
    wait_until $END_SECONDS no_daemons || daemons | end_processes KILL
    orphans | end_processes KILL
    rm -rf "$folder"
    say "down; $folder is removed"
}

require_programs() {
    local program missing=()
    for program in munged slurmctld slurmd srun; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [ ${#missing[@]} -eq 0 ] ||
        die "not installed: ${missing[*]}; on Debian 12, as root: apt-get install --no-install-recommends slurm-wlm munge"
}

check_folder() {
    case $folder in *[[:space:]]*) die "$folder has a blank in it, which slurm.conf can't; choose another folder" ;; esac
    [ ${#folder} -le 90 ] || die "$folder is too long for the path of a socket; choose one of at most 90 characters"
}

configure() {
    local host n ports
    host=$(hostname -s)
    mkdir -p "$folder/state"
    head -c 128 /dev/urandom >"$folder/munge.key"
    mapfile -t ports < <(free_ports $((nodes + 1)))
    cat >"$conf" <<CONF
ClusterName=convneur-dev
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=5
SchedulerParameters=batch_sched_delay=0
PartitionName=dev Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    for ((n = 1; n <= nodes; n++)); do
        mkdir "$folder/n$n"
        echo "NodeName=n$n NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[n]}" \
            "Sockets=2 CoresPerSocket=$((CORES / 2)) RealMemory=$MEMORY_MB Gres=gpu:$GPUS" >>"$conf"
    done
    # Slurm wants a device for every GPU and takes the GPU's number from its name.
    for ((n = 0; n < GPUS; n++)); do
        ln -s /dev/null "$folder/gpu$n"
    done
    echo "Name=gpu File=$folder/gpu[0-$((GPUS - 1))]" >"$folder/gres.conf"
}

# Ports of this machine that nothing listens on, below those that the kernel gives to outgoing connections.
free_ports() {
    local count=$1 port
    for port in $(shuf -i 20000-32000 -n 200); do
        [ "$count" -gt 0 ] || return 0
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port" && count=$((count - 1)); }
    done
}

start_daemons() {
    local n
    # slurmd tries to close as many files as it may have open before it starts a step, and is late with a huge limit.
    ulimit -Sn 4096 2>/dev/null || true
    # --force: a folder that others can't enter is what is wanted here.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" || return
    slurmctld -f "$conf" || return
    for ((n = 1; n <= nodes; n++)); do
        slurmd -f "$conf" -N "n$n" || return
    done
}

is_up() { [ -e "$conf" ] && timeout 5 scontrol ping 2>/dev/null | grep -q UP; }
all_idle() { [ "$(sinfo --noheader --Node --format %T 2>/dev/null | grep -cx idle)" = "$nodes" ]; }
no_jobs() { [ -z "$(squeue --noheader)" ]; }
no_daemons() { [ -z "$(daemons)" ]; }

# Processes of this cluster's daemons: those whose number is in the folder and whose command line names the folder.
daemons() {
    local file pid
    for file in "$folder"/*.pid; do
        pid=$(cat "$file" 2>/dev/null) || continue
        if grep -qsF "$folder" "/proc/$pid/cmdline"; then echo "$pid"; fi
    done
}

# Processes of this cluster's job steps: they outlive a slurmd that dies.
orphans() {
    local process
    for process in /proc/[0-9]*; do
        grep -qszxF "SLURM_CONF=$conf" "$process/environ" || continue
        if grep -qsx slurmstepd "$process/comm" || grep -qsz '^SLURM_STEP_ID=' "$process/environ"; then
            basename "$process"
        fi
    done
}

end_processes() { xargs --no-run-if-empty kill -"$1" 2>/dev/null || true; }

wait_until() {
    local deadline=$((SECONDS + $1))
    until "$2"; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.2
    done
}

command=${1-}
shift || true
nodes=2
if [[ $command =~ ^(up|hold)$ && ${1-} =~ ^[1-9][0-9]*$ ]]; then
    nodes=$1
    shift
fi
folder=$(realpath -m -- "${1:-${TMPDIR:-/tmp}/convneur-slurm-$(id -un)}")
conf=$folder/slurm.conf
export SLURM_CONF=$conf
case $#,$command in
[01],up | [01],hold | [01],status | [01],down) "$command" ;;
*)
    sed -n 's/^#   \(slurm\/dev_cluster.sh\)/\1/p' "$0" >&2
    exit 2
    ;;
esac

# shellcheck shell=bash
# What the batch scripts share. They source it and call `train VARIANT [--dry-run] [--section.key VALUE]...`.
set -euo pipefail
notice=''
srun_pid=''
trap 'notify USR2' USR2
trap 'notify TERM' TERM
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

data=
runs=runs
convneur=("$checkout/.venv/bin/convneur")
srun_options=()
# shellcheck source=slurm/site.sh
. "$checkout/slurm/site.sh"

say() { printf 'slurm: %s\n' "$*"; }
die() {
    say "$*" >&2
    exit 2
}

# Trains a variant on all of the job's GPUs, one rank each, from the newest checkpoint of its run if there is one.
train() {
    local word dry_run=no
    command=("${convneur[@]}" train --config "$checkout/configs/$1.yaml" --launch env --resume auto)
    command+=(--run.root "$runs" ${data:+--data.root "$data"})
    for word in "${@:2}"; do
        if [ "$word" = --dry-run ]; then dry_run=yes; else command+=("$word"); fi
    done

    if [ $dry_run = yes ]; then
        preview
        return
    fi
    [ -n "${SLURM_JOB_ID-}" ] || die "not in a Slurm job. Submit it: sbatch $0; or see what it would do: $0 --dry-run"
    open_log
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
    divide "$SLURM_NNODES" "$SLURM_NTASKS" "${SLURM_GPUS_ON_NODE:-0}" "$SLURM_CPUS_ON_NODE"
    set_environment
    "${command[@]}" --check "$ranks" # says once what every rank would say
    start_ranks
    await_ranks
}

# Prints what the job would be and would run, from the script's own #SBATCH lines. Needs no Slurm.
preview() {
    local nodes tasks
    nodes=$(directive nodes) tasks=$(directive ntasks-per-node)
    divide "$nodes" $((nodes * tasks)) "$(directive gpus-per-node)" $((tasks * $(directive cpus-per-task)))
    echo "sbatch options, each of which can be given another value on the command line of sbatch:"
    sed -n 's/^#SBATCH /  /p' "$0"
    echo "log: $(log_file "$(directive job-name)" JOBID)"
    echo "command:$(printf ' %q' "${srun[@]}" "${command[@]}")"
}

directive() { sed -n "s/^#SBATCH --$1=//p" "$0"; }
log_file() { echo "$runs/slurm/$1-$2.out"; }

# Slurm ends a job without a word if the folder of its --output doesn't exist. So the scripts keep to Slurm's default, a
# file in the folder that the job is submitted from, and name the log there. A user's own --output is the log itself.
open_log() {
    local opened log
    opened=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
    [ "${opened##*/}" = "slurm-$SLURM_JOB_ID.out" ] || return 0
    log=$(log_file "$SLURM_JOB_NAME" "$SLURM_JOB_ID")
    mkdir -p "$(dirname "$log")"
    say "the log of this job is $log"
    exec >>"$log" 2>&1
}

# Divides a job's nodes among its ranks, not more of them than GPUs where there are any; sets `srun` to what starts them.
divide() {
    local nodes=$1 tasks=$2 gpus=$3 cpus=$4
    ranks_per_node=$((tasks / nodes))
    if [ "$gpus" -gt 0 ] && [ "$ranks_per_node" -gt "$gpus" ]; then ranks_per_node=$gpus; fi
    [ "$ranks_per_node" -gt 0 ] || die "$tasks tasks on $nodes nodes; expected at least one a node: --ntasks-per-node"
    ranks=$((nodes * ranks_per_node))
    cpus_per_rank=$((cpus / ranks_per_node))
    srun=(srun --nodes="$nodes" --ntasks="$ranks" --ntasks-per-node="$ranks_per_node")
    # Every rank sees all GPUs of its node and takes the one of its local rank: NCCL joins GPUs that see each other best.
    [ "$gpus" -eq 0 ] || srun+=(--gpus-per-node="$gpus")
    srun+=(--cpus-per-task="$cpus_per_rank" --cpu-bind=cores --mpi=none --kill-on-bad-exit=1)
    srun+=("${srun_options[@]}" "$checkout/slurm/rank.sh")
}

# Sets and prints what the ranks' libraries read from the environment. What site.sh or the user has set stays.
set_environment() {
    local cores first interface
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') # its name may not resolve
    MASTER_PORT=$(free_port "$MASTER_ADDR")
    interface=$(interface_of "$MASTER_ADDR")
    [ -z "$interface" ] || GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} # gloo would guess from the host's name
    cores=$(($(env -u OMP_NUM_THREADS nproc) / ranks_per_node))                  # fewer than Slurm says on a dev cluster
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 1 ? 1 : cores < cpus_per_rank ? cores : cpus_per_rank))}
    PYTHONUNBUFFERED=1 # the log shows a line when it is written
    export MASTER_ADDR MASTER_PORT GLOO_SOCKET_IFNAME OMP_NUM_THREADS PYTHONUNBUFFERED
    # sbatch leaves these for srun, where they contradict its options.
    unset SLURM_CPUS_PER_GPU SLURM_GPUS_PER_NODE
    say "$(env | grep -E '^(GLOO|MASTER|NCCL|OMP)_' | sort | xargs)"
}

# A port that nothing on this machine listens on; the search starts elsewhere for every job and every start of it. All of
# them are below those that the kernel gives to outgoing connections.
free_port() {
    local port=$((20000 + (7 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 12000))
    while (exec 3<>"/dev/tcp/$1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo $port
}

# The network interface of this machine that has an address; nothing if that can't be told.
interface_of() {
    local ip
    ip=$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }') || return 0
    PATH=$PATH:/usr/sbin:/sbin ip -o addr show to "$ip" 2>/dev/null | awk 'NR == 1 { print $2 }' || true
}

start_ranks() {
    say "$(printf '%q ' "${srun[@]}" "${command[@]}")"
    (trap '' USR2 && exec "${srun[@]}" "${command[@]}") & # srun, too, dies of a notice that it isn't ready for
    srun_pid=$!
    [ -z "$notice" ] || pass_on
}

# Takes Slurm's notice that it is about to take the nodes away: USR2 ahead of a time limit or a preemption, TERM when it
# does so.
notify() {
    [ -z "$notice" ] || return 0
    notice=$1
    say "$notice: the job is about to lose its nodes"
    [ -z "$srun_pid" ] || pass_on
}

# Tells the ranks, by USR2 in both cases because srun kills them on TERM; and again and again, because one that is still
# starting doesn't hear it.
pass_on() {
    while sleep 2 && kill -USR2 "$srun_pid" 2>/dev/null; do :; done &
}

# Waits for srun, however often a signal interrupts that, and queues the job again if ranks have stopped ahead of time.
await_ranks() {
    local status
    while status=0 && { wait "$srun_pid" || status=$?; } && kill -0 "$srun_pid" 2>/dev/null; do :; done
    if [ "$notice" = USR2 ] && [ $status = 0 ]; then
        say "queueing the job again, to go on from its checkpoint"
        scontrol requeue "$SLURM_JOB_ID" || say "that failed; submit the job again to go on" >&2
    fi
    return $status
}

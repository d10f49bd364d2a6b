# shellcheck shell=bash
# What the batch scripts share. They source it and call `train VARIANT [--dry-run] [--section.key VALUE]...`,
# `study FILE [--dry-run] [--section.key VALUE]...`, or `evaluate CHECKPOINT_OR_RUN [--dry-run] [FLAG]...`.
set -euo pipefail
notice=$(mktemp -u) # a file that appears when Slurm is about to take the nodes away, however early that is
trap 'rm -f "$notice"' EXIT
# USR2 comes ahead of a time limit or a preemption, TERM when the nodes are taken.
trap 'notify USR2' USR2
trap 'notify TERM' TERM
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

data=
runs=runs
convneur=("$checkout/.venv/bin/convneur")
python=$checkout/.venv/bin/python
srun_options=()
supervisor_options=()
# shellcheck source=slurm/site.sh
. "$checkout/slurm/site.sh"

say() { printf 'slurm: %s\n' "$*"; }
die() {
    say "$*" >&2
    exit 2
}

# Trains a variant on all of the job's GPUs, one rank each, from the newest checkpoint of its run if there is one.
train() {
    command=(train --config "$checkout/configs/$1.yaml" --launch env --resume auto)
    command+=(--run.root "$runs" ${data:+--data.root "$data"})
    finish_command "${@:2}"
    if [ $dry_run = yes ]; then
        preview
        return
    fi
    prepare
    supervise
}

# Trains a study's unfinished runs, or this array task's share of them, one after the other. A run that fails for good is
# left behind.
study() {
    local files file failed=no status
    [ $# -gt 0 ] || die "expected the study's file: study.sh STUDY.yaml"
    deal
    command=(study missing "$1" "${part[@]}" --run.root "$runs" ${data:+--data.root "$data"})
    finish_command "${@:2}"
    if [ $dry_run = yes ]; then
        echo "runs:$(printf ' %q' "${command[@]}")"
        command=("${convneur[@]}" train --config FILE --launch env --resume auto)
        preview
        return
    fi
    prepare
    files=$("${command[@]}")
    while read -r -u 3 file; do
        [ -n "$file" ] || continue
        command=("${convneur[@]}" train --config "$file" --launch env --resume auto)
        status=0
        supervise || status=$?
        [ ! -e "$notice" ] || return $status
        if [ $status != 0 ]; then
            say "$file failed; going on with the next run"
            failed=yes
        elif [ ! -e "$folder/summary.json" ]; then
            return # the job is queued again
        fi
    done 3<<<"$files"
    [ $failed = no ]
}

# Sets `part` to what tells a command its share in an array's work; to nothing outside of arrays.
deal() {
    part=()
    [ -n "${SLURM_ARRAY_TASK_ID-}" ] || return 0
    if [ "${SLURM_ARRAY_TASK_MIN-}" != 1 ] || [ "$SLURM_ARRAY_TASK_MAX" != "$SLURM_ARRAY_TASK_COUNT" ]; then
        die "--array is ${SLURM_ARRAY_TASK_MIN}-${SLURM_ARRAY_TASK_MAX}, expected 1-N"
    fi
    part=(--part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT")
}

# Scores a checkpoint, once: what fails is submitted again by hand.
evaluate() {
    command=(eval --launch env)
    finish_command "$@"
    if [ $dry_run = yes ]; then
        preview
        return
    fi
    prepare
    CONVNEUR_FAULTS=$(mktemp -d -p "$(dirname "$(log_file x x)")")
    MASTER_PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    export CONVNEUR_FAULTS MASTER_PORT
    "${srun[@]}" "${command[@]}"
    rm -r "$CONVNEUR_FAULTS"
}

# Adds the words after a script's name to the command; takes --dry-run out of them.
finish_command() {
    local word
    dry_run=no
    command=("${convneur[@]}" "${command[@]}")
    for word in "$@"; do
        if [ "$word" = --dry-run ]; then dry_run=yes; else command+=("$word"); fi
    done
}

# Checks that this is a job; divides its nodes among ranks and sets their environment.
prepare() {
    [ -n "${SLURM_JOB_ID-}" ] || die "not in a Slurm job. Submit it: sbatch $0; or see what it would do: $0 --dry-run"
    open_log
    mkdir -p "$(dirname "$(log_file x x)")"
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
    divide "$SLURM_NNODES" "$SLURM_NTASKS" "${SLURM_GPUS_ON_NODE:-0}" "$SLURM_CPUS_ON_NODE"
    set_environment
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
    interface=$(interface_of "$MASTER_ADDR")
    [ -z "$interface" ] || GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} # gloo would guess from the host's name
    cores=$(($(env -u OMP_NUM_THREADS nproc) / ranks_per_node))                  # fewer than Slurm says on a dev cluster
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 1 ? 1 : cores < cpus_per_rank ? cores : cpus_per_rank))}
    PYTHONUNBUFFERED=1 # the log shows a line when it is written
    export MASTER_ADDR GLOO_SOCKET_IFNAME OMP_NUM_THREADS PYTHONUNBUFFERED
    # sbatch leaves these for srun, where they contradict its options.
    unset SLURM_CPUS_PER_GPU SLURM_GPUS_PER_NODE
    say "$(env | grep -E '^(GLOO|MASTER|NCCL|OMP)_' | sort | xargs)"
}

# The network interface of this machine that has an address; nothing if that can't be told.
interface_of() {
    local ip
    ip=$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }') || return 0
    PATH=$PATH:/usr/sbin:/sbin ip -o addr show to "$ip" 2>/dev/null | awk 'NR == 1 { print $2 }' || true
}

# Starts the ranks, and sees to it that they go on: launch/supervise.py. A check first says once what all would say.
# Sets `folder` to the run's.
supervise() {
    local plan
    plan=$("${command[@]}" --check "$ranks" --json) || return
    folder=$("$python" -c 'import json, sys; print(json.loads(sys.argv[1])["folder"])' "$plan") || return
    case $plan in *'"finished": true'*)
        say "the run is finished already; --run.name NAME starts another"
        return
        ;;
    esac
    (
        trap '' USR2 TERM # it looks for the notice
        exec "$python" -I "$checkout/launch/supervise.py" --folder "$folder" --notice "$notice" \
            "${supervisor_options[@]}" -- "${srun[@]}" "${command[@]}"
    ) &
    local pid=$! status
    # `wait` returns early when a signal comes.
    while wait $pid || kill -0 $pid 2>/dev/null; do kill -0 $pid 2>/dev/null || break; done
    status=0
    wait $pid || status=$? # its own, also where a signal came at the very end
    return $status
}

notify() {
    [ ! -e "$notice" ] || return 0
    : >"$notice"
    say "$1: the job is about to lose its nodes"
    # A job whose limit is within the notice makes a step or two, and queues again for the next, for ever.
    [ $SECONDS -ge 60 ] || say "after $SECONDS s; if --time is no longer than the notice of --signal, ask for more of it"
}
[ -z "${early-}" ] || notify "a signal"

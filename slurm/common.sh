# shellcheck shell=bash
# What the batch scripts share. They source it and call `train VARIANT [--dry-run] [--section.key VALUE]...`,
# `study FILE [--dry-run] [--section.key VALUE]...`, or `evaluate CHECKPOINT_OR_RUN [--dry-run] [FLAG]...`.
# What is special about a cluster is read first, as any shell would read it: it may fail, print, and leave settings,
# folders and names behind. What is ours is set afterwards.
our_folder=$PWD our_words=("$@") our_options=$(set +o) our_shopts=$(shopt -p || true)
our_checkout=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
checkout=$our_checkout
data=
runs=runs
convneur=("$checkout/.venv/bin/convneur")
python=$checkout/.venv/bin/python
srun_options=()
supervisor_options=()
trap 'echo "slurm: $our_checkout/slurm/site.sh has ended the job: take exit, set -e and set -u out of it" >&2; exit 2' EXIT
set +euo pipefail
# shellcheck source=slurm/site.sh
. "$checkout/slurm/site.sh"
eval "$our_options"
eval "$our_shopts"
set -euo pipefail
trap - EXIT DEBUG ERR RETURN
unset -f command builtin cd echo printf trap wait kill exec
unset CDPATH IFS
cd -- "$our_folder"
set -- ${our_words[@]+"${our_words[@]}"}
checkout=$our_checkout

say() { printf 'slurm: %s\n' "$*" || true; } # a log on a full disk ends nothing
die() {
    say "$*" >&2
    exit 2
}

# A folder that nobody else can write to, for a file that appears in it when Slurm is about to take the nodes away,
# however early that is. The node's own: TMPDIR may be the login node's, or full.
private=
for parent in "${TMPDIR:-/tmp}" /tmp /dev/shm "$our_folder"; do
    private=$(mktemp -d "$parent/convneur-XXXXXXXX" 2>/dev/null) && : 2>/dev/null >"$private/unsaid" && break
    [ -z "$private" ] || rmdir "$private" || true
    private=
done
[ -n "$private" ] || die "no folder can be made in ${TMPDIR:-/tmp}, /tmp, /dev/shm or $our_folder: see to a TMPDIR with room"
notice=$private/notice
trap 'rm -rf "$private"' EXIT
# USR2 comes ahead of a time limit or a preemption, or what else --signal asks for; TERM when the nodes are taken.
signals=(HUP INT QUIT ABRT ALRM TERM USR1 USR2 URG TSTP TTIN TTOU VTALRM PROF XCPU IO PWR)
# shellcheck disable=SC2064
for name in "${signals[@]}"; do trap "notify $name" "$name"; done

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
    mkdir -p -- "$runs/slurm"
    CONVNEUR_FAULTS=$(mktemp -d -p "$runs/slurm")
    trap 'rm -rf "$private" "$CONVNEUR_FAULTS"' EXIT
    MASTER_PORT=$("$python" -Ic 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    export CONVNEUR_FAULTS MASTER_PORT
    "${srun[@]}" "${command[@]}"
}

# Adds the words after a script's name to the command; takes --dry-run out of them. Every start of a job has the same
# words, so --resume says where the run begins: it goes on from its own checkpoints.
finish_command() {
    dry_run=no
    command=("${convneur[@]}" "${command[@]}")
    while [ $# -gt 0 ]; do
        case $1 in
        --dry-run) dry_run=yes ;;
        --resume=auto) ;;
        --resume=*) command+=("--begin=${1#--resume=}") ;;
        --resume)
            if [ $# -gt 1 ]; then
                set -- "$1=$2" "${@:3}"
                continue
            fi
            command+=("$1")
            ;;
        *) command+=("$1") ;;
        esac
        shift
    done
}

# Checks that this is a job; divides its nodes among ranks and sets their environment.
prepare() {
    [ -n "${SLURM_JOB_ID-}" ] || die "not in a Slurm job. Submit it: sbatch $0; or see what it would do: $0 --dry-run"
    check_signal
    open_log
    # sbatch leaves these for srun, where they contradict its options: what the ranks see of the environment and the GPUs.
    unset SLURM_EXPORT_ENV SLURM_CPUS_PER_GPU SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_SOCKET SLURM_GPUS_PER_TASK
    unset SLURM_GPU_BIND SLURM_MEM_PER_GPU SLURM_NTASKS_PER_GPU SLURM_STEP_GRES SLURM_TRES_BIND SLURM_TRES_PER_TASK
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
    divide "$SLURM_NNODES" "${SLURM_NTASKS:-$SLURM_NNODES}" "${SLURM_GPUS_ON_NODE:-0}" "$SLURM_CPUS_ON_NODE"
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
    opened=$(ask scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p') || true
    [ "${opened##*/}" = "slurm-$SLURM_JOB_ID.out" ] || return 0
    log=$(log_file "$SLURM_JOB_NAME" "$SLURM_JOB_ID")
    if ! { mkdir -p -- "$(dirname -- "$log")" && : >>"$log"; }; then
        say "the log stays here"
        return
    fi
    say "the log of this job is $log"
    exec >>"$log" 2>&1
}

# What one of Slurm's commands answers; it is asked again for a minute or so. Nothing if it doesn't answer.
ask() {
    local answer pause
    for pause in 1 2 5 10 20 30 0; do
        if answer=$("$@"); then
            printf '%s\n' "$answer"
            return
        fi
        say "no answer to: $*" >&2
        sleep $pause
    done
    return 1
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
    local address cores first interface
    first=$(ask scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) || true
    first=${first:-$(hostname)} # the batch script runs on the first node
    # Its name may not resolve.
    MASTER_ADDR=$(ask scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || true
    for address in "${MASTER_ADDR:-$first}" $(hostname -I 2>/dev/null || true); do
        MASTER_ADDR=$address
        if getent ahosts "$address" >/dev/null; then break; fi
        say "$address does not resolve here"
    done
    interface=$(interface_of "$MASTER_ADDR")
    [ -z "$interface" ] || GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} # gloo would guess from the host's name
    cores=$(($(env -u OMP_NUM_THREADS nproc) / ranks_per_node))                  # fewer than Slurm says on a dev cluster
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 1 ? 1 : cores < cpus_per_rank ? cores : cpus_per_rank))}
    PYTHONUNBUFFERED=1 # the log shows a line when it is written
    export MASTER_ADDR GLOO_SOCKET_IFNAME OMP_NUM_THREADS PYTHONUNBUFFERED
    say "$(env | grep -E '^(GLOO|MASTER|NCCL|OMP)_' | sort | paste -sd ' ' -)"
}

# The network interface of this machine that has an address; nothing if that can't be told.
interface_of() {
    local ip
    ip=$(getent ahosts "$1" | awk 'NR == 1 { print $1 }') || return 0
    PATH=$PATH:/usr/sbin:/sbin ip -o addr show to "$ip" 2>/dev/null | awk 'NR == 1 { print $2 }' || true
}

# Starts the ranks, and sees to it that they go on: launch/supervise.py. A check first says once what all would say.
# Sets `folder` to the run's.
supervise() {
    local plan='' status
    check || return
    folder=$(planned folder) || return
    if [ "$(planned finished)" = True ]; then
        say "the run is finished already; --run.name NAME starts another"
        return
    fi
    (
        trap '' "${signals[@]}" # it looks for the notice
        exec "$python" -IB "$checkout/launch/supervise.py" --folder "$folder" --notice "$notice" \
            "${supervisor_options[@]}" -- "${srun[@]}" "${command[@]}"
    ) &
    local pid=$!
    # `wait` returns early when a signal comes.
    while wait $pid || kill -0 $pid 2>/dev/null; do kill -0 $pid 2>/dev/null || break; done
    status=0
    wait $pid || status=$? # its own, also where a signal came at the very end
    return $status
}

# Sets `plan` to what `--check --json` prints last. What needs but time is waited for.
check() {
    local failures=0 missing=0 pause=15
    while :; do
        status=0
        plan=$("${command[@]}" --check "$ranks" --json) || status=$?
        [ $status != 0 ] || return 0
        if [ $status = 2 ]; then
            # The input was good when the job began: what isn't there now may come back with its storage.
            [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || [ $pause -gt 15 ] || return 2
            missing=$((missing + 1))
            [ $missing -lt 6 ] || return 2
        fi
        if [ $status != 74 ] && [ $status != 2 ]; then # convneur.data.errors.OUTAGE_STATUS
            failures=$((failures + 1))
            [ $failures -lt 3 ] || return $status
        fi
        say "the check ended with status $status; it is made again in $pause s"
        wait_for_notice $pause || break
        pause=$((pause < 300 ? 2 * pause : 600))
    done
    case " ${supervisor_options[*]-} " in *" --no-requeue "*) return $status ;; esac
    ask scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}" || exit 1
    exit 0
}

planned() { "$python" -Ic 'import json, sys; print(json.loads(sys.argv[1].splitlines()[-1])[sys.argv[2]])' "$plan" "$1"; }

# Waits some seconds; fails where the notice comes before they are over.
wait_for_notice() {
    local end=$((SECONDS + $1))
    while [ $SECONDS -lt $end ]; do
        [ ! -e "$notice" ] || return 1
        sleep 1
    done
}

# Refuses what the script asks for by --signal and no shell can hear, or Slurm sends for other reasons.
check_signal() {
    local asked
    asked=${SBATCH_SIGNAL:-$(directive signal)}
    case ${asked##*:} in
    KILL* | STOP* | CONT* | 9 | 9@* | 17 | 17@* | 18 | 18@* | 19 | 19@*)
        die "--signal is $asked, which can't be heard as a notice; expected --signal=B:USR2@300"
        ;;
    esac
}

notify() {
    [ ! -e "$notice" ] || return 0
    mv -f "$private/unsaid" "$notice" 2>/dev/null || return 0 # it needs no room on a disk
    say "$1: the job is about to lose its nodes"
    # A job whose limit is within the notice makes a step or two, and queues again for the next, for ever.
    [ $SECONDS -ge 60 ] || say "after $SECONDS s; if --time is no longer than the notice of --signal, ask for more of it"
}
[ -z "${early-}" ] || notify "a signal"

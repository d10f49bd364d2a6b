#!/usr/bin/env bash
# What srun starts as each rank: gives Slurm's numbers the names that PyTorch reads, runs the command, and leaves word
# of how it ended if it failed, and of a signal that says that the nodes are about to be lost.
: "${CONVNEUR_FAULTS:?srun has not passed on the environment of the batch script; see srun_options in slurm/site.sh}"
# Any signal that --signal can be asked for is a notice: launch/supervise.py tells all ranks by USR2 till they have heard
# it, and the command doesn't die of it. TERM, which ends the ranks beside one that has failed, too, is the command's.
signals="HUP INT QUIT ABRT ALRM USR1 USR2 URG TSTP TTIN TTOU VTALRM PROF XCPU IO PWR"
# shellcheck disable=SC2086
trap ': >"$CONVNEUR_FAULTS/notice"' $signals
trap '' TERM
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export TORCHELASTIC_ERROR_FILE=$CONVNEUR_FAULTS/rank-$RANK.json # where torch records what made a rank fail
[ "$RANK" != 0 ] || sed -n 's/^Cpus_allowed_list:\s*/slurm: rank 0 is bound to CPUs /p' /proc/self/status
(
    # shellcheck disable=SC2086
    trap '' $signals
    exec "$@"
) &
child=$!
# `wait` returns early when a signal comes.
while wait "$child" || kill -0 "$child" 2>/dev/null; do kill -0 "$child" 2>/dev/null || break; done
wait "$child"
status=$?
[ $status = 0 ] || echo "$(date +%s.%N) $status $SLURMD_NODENAME" >"$CONVNEUR_FAULTS/rank-$RANK.ended"
exit $status

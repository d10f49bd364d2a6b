#!/usr/bin/env bash
# What srun starts as each rank: gives Slurm's numbers the names that PyTorch reads, runs the command, and leaves word
# of how it ended if it failed.
trap '' USR2 TERM # a notice that arrives before the command listens for it must not kill it
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export TORCHELASTIC_ERROR_FILE=$CONVNEUR_FAULTS/rank-$RANK.json # where torch records what made a rank fail
[ "$RANK" != 0 ] || sed -n 's/^Cpus_allowed_list:\s*/slurm: rank 0 is bound to CPUs /p' /proc/self/status
"$@"
status=$?
[ $status = 0 ] || echo "$(date +%s.%N) $status $SLURMD_NODENAME" >"$CONVNEUR_FAULTS/rank-$RANK.ended"
exit $status

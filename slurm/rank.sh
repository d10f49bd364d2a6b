#!/usr/bin/env bash
# What srun starts as each rank: gives Slurm's numbers the names that PyTorch reads, then becomes the command.
trap '' USR2 # a notice that arrives before the command listens for it must not kill it
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
[ "$RANK" != 0 ] || sed -n 's/^Cpus_allowed_list:\s*/slurm: rank 0 is bound to CPUs /p' /proc/self/status
exec "$@"

#!/usr/bin/env bash
# Trains ConvNeur-M9 (375.3 M parameters): sbatch [OPTIONS] slurm/train_m9.sh [--section.key VALUE]...
#SBATCH --job-name=m9
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append

trap 'early=yes' USR2 TERM # until common.sh listens
# Slurm runs a copy of this file; what it needs lies beside the original.
original=${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\/train_m9\.sh\).*/\1/p;T;q')}
# shellcheck source=slurm/common.sh
. "$(dirname "${original:-$0}")/common.sh"
train m9 "$@"

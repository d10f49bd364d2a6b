#!/usr/bin/env bash
# Trains ConvNeur-M2 (6.1 M parameters): sbatch [OPTIONS] slurm/train_m2.sh [--section.key VALUE]...
#SBATCH --job-name=m2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append

trap 'early=yes' USR2 TERM # until common.sh listens
# Slurm runs a copy of this file; what it needs lies beside the original.
original=${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\/train_m2\.sh\).*/\1/p;T;q')}
# shellcheck source=slurm/common.sh
. "$(dirname "${original:-$0}")/common.sh"
train m2 "$@"

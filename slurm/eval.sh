#!/usr/bin/env bash
# Measures a checkpoint's accuracy on all GPUs of a job: sbatch [OPTIONS] slurm/eval.sh CHECKPOINT_OR_RUN [--ema]
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=01:00:00
#SBATCH --open-mode=append

# Slurm runs a copy of this file; what it needs lies beside the original.
original=${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\/eval\.sh\).*/\1/p;T;q')}
# shellcheck source=slurm/common.sh
. "$(dirname "${original:-$0}")/common.sh"
evaluate "$@"

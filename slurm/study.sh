#!/usr/bin/env bash
# Trains the runs of a scaling study that aren't finished: sbatch [OPTIONS] slurm/study.sh STUDY.yaml [--section.key VALUE]...
# With --array=1-N the runs are dealt out to N tasks, %M after it keeps to M of them at a time; each trains its own one
# after the other. Submitted again, it goes on with what is missing.
#SBATCH --job-name=study
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
original=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null |
    sed -n 's/^ *Command=\(.*\/study\.sh\).*/\1/p' | head -n 1)
# shellcheck source=slurm/common.sh
. "$(dirname "${original:-$0}")/common.sh"
study "$@"

#!/usr/bin/env bash
# Measures a checkpoint's accuracy on all GPUs of a job: sbatch [OPTIONS] slurm/eval.sh CHECKPOINT_OR_RUN [--ema]
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=01:00:00
#SBATCH --open-mode=append

# Slurm runs a copy of this file. common.sh lies beside the original, or in the checkout that the job was submitted from.
original=$(readlink -f -- "$0")
[ -e "${original%/*}/common.sh" ] || for pause in ${SLURM_JOB_ID:+0 1 5 15 30}; do
    sleep "$pause"
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p;T;q')
    [ -z "$original" ] || break
done
while [[ $original = *" "* && ! -f $original ]]; do original=${original% *}; done # without the words after it
for home in "$(dirname -- "$(readlink -f -- "$original")")" "${SLURM_SUBMIT_DIR-.}"{/slurm,}; do
    [ ! -e "$home/common.sh" ] || break
done
[ -e "$home/common.sh" ] || { echo "${original:-$0}: no common.sh beside it; submit it from slurm/ or a checkout" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$home/common.sh"
evaluate "$@"

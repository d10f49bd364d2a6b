#!/usr/bin/env bash
# Trains ConvNeur-M8 (211.9 M parameters): sbatch [OPTIONS] slurm/train_m8.sh [--section.key VALUE]...
#SBATCH --job-name=m8
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append

trap 'early=yes' HUP INT QUIT ALRM TERM USR1 USR2 # until common.sh listens
# Slurm runs a copy of this file. What it needs lies beside the original, whatever that is called, or in the checkout
# that the job was submitted from.
script=$(readlink -f -- "$0") original=
for pause in 1 5 15 30 0; do
    if [ -z "${SLURM_JOB_ID-}" ] || [ -n "$original" ] || [ -e "${script%/*}/common.sh" ]; then break; fi
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p;T;q')
    [ -n "$original" ] || sleep $pause
done
while [[ $original = *" "* && ! -f $original ]]; do original=${original% *}; done # without the words after it
original=$(readlink -f -- "${original:-$script}") || original=$script
for home in "${script%/*}" "${original%/*}" "${SLURM_SUBMIT_DIR-.}/slurm" "${SLURM_SUBMIT_DIR-.}"; do
    [ ! -e "$home/common.sh" ] || break
done
[ -e "$home/common.sh" ] || { echo "$original: no common.sh beside it; submit it from slurm/ or a checkout" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$home/common.sh"
train m8 "$@"

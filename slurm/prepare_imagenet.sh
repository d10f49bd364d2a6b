#!/usr/bin/env bash
# ImageNet to WebDataset shards on many nodes: an array job writes the shards, a job after it the index.
#   job=$(sbatch --parsable --array=1-16 slurm/prepare_imagenet.sh SOURCE OUT [--max-side PIXELS])
#   sbatch --dependency=afterok:$job slurm/prepare_imagenet.sh SOURCE OUT [--max-side PIXELS]
# Submitted again after a failure, both go on where they stopped. Without an array, one job does everything.
#SBATCH --job-name=prepare-imagenet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue

# Slurm runs a copy of this file; what it needs lies beside the original.
original=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null |
    sed -n 's/^ *Command=\(.*\/prepare_imagenet\.sh\).*/\1/p' | head -n 1)
# shellcheck source=slurm/common.sh
. "$(dirname "${original:-$0}")/common.sh"
[ $# -ge 2 ] || die "expected the folder with ImageNet and the folder to write to: prepare_imagenet.sh SOURCE OUT"

deal
exec "${convneur[@]}" prepare imagenet --source "$1" --out "$2" "${part[@]}" \
    --processes "${SLURM_CPUS_PER_TASK:-$(nproc)}" "${@:3}"

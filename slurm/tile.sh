#!/usr/bin/env bash
# A tiled copy of a prepared dataset on many nodes: an array job writes the shards, a job after it the index.
#   job=$(sbatch --parsable --array=1-16 slurm/tile.sh DATASET OUT --tiles 4)
#   sbatch --dependency=afterok:$job slurm/tile.sh DATASET OUT --tiles 4
# Submitted again after a failure, both go on where they stopped. Without an array, one job does everything.
#SBATCH --job-name=tile
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue

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
[ $# -ge 4 ] || die "expected the dataset, the folder to write to, and --tiles: tile.sh DATASET OUT --tiles 4"

deal
rm -r "$private"
exec "${convneur[@]}" prepare tile "$1" --out "$2" "${part[@]}" \
    --processes "${SLURM_CPUS_PER_TASK:-$(nproc)}" "${@:3}"

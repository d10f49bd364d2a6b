#!/usr/bin/env bash
# What a job of `convneur submit` runs, from the snapshot that this file is part of: submitted.sh PYTHON CONFIG [FLAG]
# shellcheck source=slurm/common.sh
. "$(dirname "$0")/common.sh"
export PYTHONPATH=$checkout/packages
if [ "$python" = "$checkout/.venv/bin/python" ]; then python=$1; fi
if [ "${convneur[0]}" = "$checkout/.venv/bin/convneur" ]; then convneur=("$1" -P -m convneur.launch); fi
supervisor_options=(--no-requeue) # after a notice; submitit does it then
command=("${convneur[@]}" train --config "$2" --launch env --resume auto "${@:3}")
prepare
supervise

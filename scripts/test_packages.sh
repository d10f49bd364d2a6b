#!/usr/bin/env bash
# Part of `make test`: installs the system packages that some tests want, where that can be done, as root on Debian and
# alike; says elsewhere what goes untested without them. Nothing that it installs is needed to train.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # where Debian puts Slurm's daemons

say() { printf 'test packages: %s\n' "$*"; }

find_missing() {
    missing=()
    need() { command -v "$2" >/dev/null || missing+=("$1"); }
    need slurmctld slurmctld
    need slurmd slurmd
    need slurm-client srun
    need munge munged
    need iproute2 ip
    need shellcheck shellcheck
}

find_missing
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    if ! { dpkg --configure -a && apt-get update -qq &&
        apt-get install -qq --no-install-recommends --fix-broken "${missing[@]}"; } >/dev/null; then
        say "apt-get failed (its messages are above)" >&2
    fi
    find_missing
fi
[ ${#missing[@]} -eq 0 ] ||
    say "without ${missing[*]}, tests of batch scripts are skipped. As root: apt-get install ${missing[*]}" >&2

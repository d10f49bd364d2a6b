#!/usr/bin/env bash
# The work of `make setup`: scripts/setup.sh VENV CONSTRAINTS
#
# Makes the virtual environment VENV with everything that ConvNeur needs, at the versions of the file CONSTRAINTS.
# Every step may be repeated, so an interrupted set-up goes on where it stopped. When nothing has changed since the
# last one, it says so and ends.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
constraints=$2
python=${PYTHON:-python3}
stamp=$venv/setup.sha256

say() { printf 'setup: %s\n' "$*"; }
die() {
    say "$*" >&2
    exit 1
}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# The Debian packages that this machine lacks, in the array `missing`.
find_missing() {
    missing=()
    need() { "${@:2}" >/dev/null 2>&1 || missing+=("$1"); }
    need python3-venv "$python" -c 'import ensurepip'
    need python3-dev test -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
    need g++ command -v g++
    need pkg-config command -v pkg-config
    need libopencv-dev pkg-config --exists opencv4
    need libturbojpeg0-dev pkg-config --exists libturbojpeg
}

# Changes when a set-up would do something. The Python is that outside of virtual environments, activated or not.
fingerprint() {
    {
        echo "$PWD" "$("$python" -c 'import sys; print(sys.base_prefix, sys.version)')" "${missing[@]}"
        cat "$constraints" constraints/base.txt setup.cfg pyproject.toml scripts/setup.sh scripts/prefer_installed.py
    } | sha256sum
}

[ -f "$constraints" ] || die "$constraints does not exist; TORCH is one of: $(cd constraints && echo torch-*.txt)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "$python is not Python 3.11 or newer; install one and name it: make setup PYTHON=python3.11"

find_missing
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing system packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # `dpkg --configure` and --fix-broken finish what an interrupted installation left behind.
    if ! { dpkg --configure -a && apt-get update -qq &&
        apt-get install -qq --no-install-recommends --fix-broken "${missing[@]}"; } >/dev/null; then
        say "apt-get failed (its messages are above)" >&2
    fi
    find_missing
fi
if [ ${#missing[@]} -gt 0 ]; then
    case " ${missing[*]} " in
    *" python3-venv "*) cost="nothing works" ;;
    *" python3-dev "* | *" g++ "*) cost="a slower memory on CPUs, no FFCV engine, no torch.compile, no DeepSpeed operators in C++" ;;
    *) cost="no FFCV engine" ;;
    esac
    say "missing system packages; without them: $cost. As root: apt-get install ${missing[*]}; then: make setup" >&2
    [ "$cost" != "nothing works" ] || exit 1
fi

if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then
    say "$venv is up to date"
    exit
fi

[ ! -e "$venv" ] || [ -e "$venv/pyvenv.cfg" ] || die "$venv exists and is not a virtual environment; move it away"
rm -f "$stamp"
# pip writes INSTALLER when a package's files are in place: one without it was interrupted and must not count as there.
for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
    [ -e "$info/INSTALLER" ] || rm -rf "$info"
done
pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
say "installing the versions of $constraints into $venv (several GB the first time: allow some minutes)"
pip install -qq -c "$constraints" pip setuptools wheel
# setuptools is pinned above; without isolation the few source packages are built by it and not by the newest one.
pip install -qq -c "$constraints" --no-build-isolation -e '.[dev]'
# `import convneur` has to work from the folder that holds this one, too.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp scripts/prefer_installed.py "$site/convneur_prefer_installed.py"
echo 'import convneur_prefer_installed' >"$site/convneur_prefer_installed.pth"

if [ ${#missing[@]} -gt 0 ]; then
    say "$venv is ready, without FFCV"
elif pip install -qq -c "$constraints" --no-build-isolation -e '.[ffcv]' && "$venv/bin/python" -c 'import ffcv'; then
    say "$venv is ready, with FFCV"
else
    # No stamp: the next set-up tries again.
    say "FFCV does not build or load here (its messages are above); $venv is ready, without the FFCV engine" >&2
    exit
fi
fingerprint >"$stamp"

#!/usr/bin/env bash
# Makes .venv here: the packages pinned in requirements.txt, and mixgrpo itself (editable).
#
#   bash env_setup.sh
#
# Run again, it does only what changed; with nothing changed it takes a second.
# Environment variables, both remembered by the .venv they made:
#   PYTHON           the Python 3.11 or 3.12 to use; else the first on PATH that works
#   TORCH_INDEX_URL  the index to take torch and torchvision from, for another CUDA build;
#                    set to nothing to go back to pip's own index
set -euo pipefail

NEEDED_GB=10 # .venv 5.7, downloads while they are being unpacked 1.3, pip's cache of them 2.7

[[ ${PYTHON:-} == [!/]*/* ]] && PYTHON=$PWD/$PYTHON
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
unset PYTHONPATH PYTHONHOME

root=$PWD
venv=$root/.venv
stamp=$venv/env_setup.stamp # what .venv was made for, its torch index, what is installed in it
log=$venv/install.log

say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

die() {
    printf 'env_setup.sh: %s\n' "$*" >&2
    exit 1
}

# --- which Python ---------------------------------------------------------------------------

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

is_supported() { [[ $1 == 3.11.* || $1 == 3.12.* ]]; }

candidates() {
    if [ -n "${PYTHON:-}" ]; then
        printf '%s\n' "$PYTHON"
    else
        type -aP python3.11 python3.12 python3 python || true
    fi
}

# Sets python and version. Every candidate is run: a version manager's shim may exist and fail.
find_python() {
    local candidate found='' without_venv=''
    while IFS= read -r candidate; do
        [[ $candidate == "$venv"/* ]] && continue # an activated .venv cannot rebuild itself
        if ! version=$(version_of "$candidate"); then
            found+="${found:+, }$candidate (does not run)"
        elif ! is_supported "$version"; then
            found+="${found:+, }$candidate ($version)"
        elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            without_venv=${without_venv:-$candidate}
        else
            python=$candidate
            return
        fi
    done < <(candidates)
    if [ -n "$without_venv" ]; then
        version=$(version_of "$without_venv")
        die "$without_venv has no venv module: install it" \
            "(Debian, Ubuntu: apt install python${version%.*}-venv)" \
            "or set PYTHON to another Python 3.11 or 3.12."
    fi
    die "mixgrpo needs Python 3.11 or 3.12, and found ${found:-no Python at all}:" \
        "install one (Debian, Ubuntu: apt install python3.11 python3.11-venv)" \
        "or set PYTHON to its path, as in PYTHON=/opt/python3.11/bin/python3 bash env_setup.sh."
}

# --- the stamp: line 1 what .venv was made for, line 2 the torch index, line 3 its state --------

stamped() { [ ! -f "$stamp" ] || sed -n "$1p" "$stamp"; }

# Written whole or not at all. State: "installing", "failed", or the checksum of what is installed.
write_stamp() {
    printf '%s\n' "$made_for" "$torch_index" "$1" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

# --- installing -----------------------------------------------------------------------------

check_disk() {
    local free_kb
    free_kb=$(df -Pk "$venv/" | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge $((NEEDED_GB * 1024 * 1024)) ] ||
        die "$venv has $((free_kb / 1024 / 1024)) GB of disk left and needs $NEEDED_GB GB:" \
            "free some space, put the repository on a larger disk, or make .venv a link to one."
}

make_venv() {
    mkdir -p "$venv"
    find "$venv/" -mindepth 1 -delete # not .venv itself: it may be a link to a larger disk
    check_disk
    say "making .venv with Python $version ($python)"
    : >"$log" # marks .venv as made here, before anything can go wrong
    "$python" -m venv "$venv" >>"$log" 2>&1 ||
        die "\`$python -m venv $venv\` failed ($(tail -n 1 "$log")):" \
            "repair that Python or set PYTHON to another."
}

# What pip is at, every half minute. Kept off the lock and off the pipe our output may go to.
tick() {
    while sleep 30 >/dev/null 2>&1; do
        say "  $(grep -E '^ *(Collecting|Downloading|Building|Installing)' "$log" | tail -n 1 |
            sed -E 's/^ +//; s#(https?|file)://.*/##; s/(collected packages):.*/\1/' | cut -c 1-80)"
    done 9>&-
}

# pip_install WHAT ARGUMENT...: everything pip says goes to the log, the end of it here if it fails.
pip_install() {
    local what=$1 start status=0
    shift
    say "installing $what"
    printf '\n$ pip install %s\n' "$*" >>"$log"
    start=$(wc -l <"$log")
    tick &
    ticker=$!
    # DeepSpeed is built without its compiled operations; it asks for an accelerator even so.
    # Downloads are unpacked inside .venv: /tmp may be small.
    env DS_BUILD_OPS=0 DS_ACCELERATOR=cpu PIP_USER=0 TMPDIR="$venv/tmp" \
        "$venv/bin/python" -m pip install --no-input --disable-pip-version-check \
        --progress-bar off "$@" >>"$log" 2>&1 </dev/null || status=$?
    kill "$ticker" 2>/dev/null || true
    [ "$status" -eq 0 ] && return
    write_stamp failed
    tail -n "+$((start + 1))" "$log" | grep -v -E '^ *(WARNING.*)?$' | tail -n 12 >&2 || true
    die "installing $what failed in \`pip install $*\` (above, its last lines; all of them in $log):" \
        "mend what they name (the network, a proxy, the disk) and run env_setup.sh again."
}

pins() { grep -E "^($1)==" requirements.txt; }

install() {
    local torch=() build_tools=()
    mapfile -t build_tools < <(pins setuptools)
    mapfile -t torch < <(pins 'torch|torchvision')
    rm -rf "$venv/tmp"
    mkdir "$venv/tmp"
    pip_install "the build tools" "${build_tools[@]}"
    pip_install "torch and torchvision (the largest part)" \
        ${torch_index:+--index-url "$torch_index"} "${torch[@]}"
    pip_install "the other packages of requirements.txt" --no-build-isolation -r requirements.txt
    pip_install "mixgrpo" --no-deps --no-build-isolation -e .
    rm -rf "$venv/tmp"
}

# --- what is there, what is wanted --------------------------------------------------------------

# Two runs at once would undo each other's work.
if command -v flock >/dev/null; then
    exec 9<.
    flock -n 9 2>/dev/null || {
        say "waiting for another env_setup.sh to finish"
        flock 9 2>/dev/null || true
    }
fi

venv_version=$([ ! -x "$venv/bin/python" ] || version_of "$venv/bin/python" || true)
if [ -z "${PYTHON:-}" ] && [ -f "$stamp" ] && is_supported "$venv_version"; then
    version=$venv_version
    python=$("$venv/bin/python" -c 'import sys; print(sys._base_executable)')
else
    find_python
fi
torch_index=${TORCH_INDEX_URL-$(stamped 2)}
made_for="Python $version in $root" # a copied or moved .venv does not work
contents=$(cat requirements.txt pyproject.toml | cksum)
state=$(stamped 3)

same_venv=no
if [ "$venv_version" = "$version" ] && [ "$(stamped 1)" = "$made_for" ] &&
    [ "$(stamped 2)" = "$torch_index" ]; then
    same_venv=yes
fi

if [ $same_venv = yes ] && [ "$state" = "$contents" ]; then
    say ".venv is up to date (Python $version)"
    exit 0
fi

ticker=
trap '[ -z "$ticker" ] || kill "$ticker" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM # the state stays "installing": the next run starts afresh

if [ $same_venv = yes ] && [ "$state" != installing ]; then
    say "bringing .venv up to date"
elif [ -n "$venv_version" ] && [ ! -e "$log" ]; then
    die "$venv was not made by this script: move it away or delete it, and run env_setup.sh again."
else
    if [ -e "$venv" ]; then
        say "making .venv again: it is half-made, moved, or of another Python or torch index"
    fi
    make_venv
fi
write_stamp installing
install
write_stamp "$contents"
say "ready: .venv has $("$venv/bin/python" -m pip list --format freeze 2>/dev/null | wc -l) packages"

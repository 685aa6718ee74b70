#!/usr/bin/env bash
# Makes .venv here: the packages pinned in requirements.txt, and mixgrpo itself (editable).
#
#   bash env_setup.sh
#
# Run again, it does only what changed; with nothing changed it takes a second.
# It installs with uv, or with pip if uv cannot be installed or fails.
# uv keeps what it downloaded in its cache, and .venv links to it: `.venv/bin/uv cache clean`
# removes the cache, which takes 5 GB of its own once .venv is deleted.
# Environment variables, both remembered by the .venv they made:
#   PYTHON           the Python 3.11, 3.12 or 3.13 to use; else the first on PATH that works
#   TORCH_INDEX_URL  the index to take torch and torchvision from, for another CUDA build;
#                    set it to nothing to go back to pip's own index
set -euo pipefail

INSTALLER=uv==0.13.8 # not in requirements.txt: mixgrpo does not need it, and installs without it
NEEDED_GB=10         # with pip: .venv 5.7, unpacking downloads 1.3, its cache 2.7; uv needs less

[[ ${PYTHON:-} == [!/]*/* ]] && PYTHON=$PWD/$PYTHON
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
uv_cache=${UV_CACHE_DIR:-}
unset PYTHONPATH PYTHONHOME "${!UV_@}" # uv's own settings may be meant for another project

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

is_supported() { [[ $1 == 3.1[123].* ]]; }

candidates() {
    if [ -n "${PYTHON:-}" ]; then
        printf '%s\n' "$PYTHON"
    else
        type -aP python3.11 python3.12 python3.13 python3 python || true
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
            "or set PYTHON to another Python 3.11, 3.12 or 3.13."
    fi
    die "mixgrpo needs Python 3.11, 3.12 or 3.13, and found ${found:-no Python at all}:" \
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
        die "$venv needs $NEEDED_GB GB of disk space, and $((free_kb / 1024 / 1024)) GB are free:" \
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

# Prints the log's latest step every half minute. It holds neither the lock nor our output's pipe.
tick() {
    while sleep 30 >/dev/null 2>&1; do
        say "  $(grep -E '^ *(Collecting|Download|Buil[dt]|Install|Resolved|Prepared)' "$log" |
            tail -n 1 | sed -E 's/^ +//; s#(https?|file)://.*/##; s/(collected packages):.*/\1/' |
            cut -c 1-80)"
    done 9>&-
}

with_pip() {
    printf '\n$ pip install %s\n' "$*" >>"$log"
    pip_starts=$(($(wc -l <"$log") + 1))
    "$venv/bin/python" -m pip install --no-input --disable-pip-version-check \
        --progress-bar off "$@" >>"$log" 2>&1 </dev/null
}

with_uv() {
    printf '\n$ uv pip install %s\n' "$*" >>"$log"
    "$venv/bin/uv" pip install --python "$venv/bin/python" --color never "$@" \
        >>"$log" 2>&1 </dev/null
}

# install_step WHAT ARGUMENT...: the installer's output goes to the log. If uv fails, pip repeats the
# step and does the rest: the fault may be uv's alone. If pip fails too, only its error is shown.
install_step() {
    local what=$1 status=0
    shift
    say "installing $what"
    tick &
    ticker=$!
    if [ $use_uv = no ] || ! with_uv "$@"; then
        [ $use_uv = no ] || say "  uv failed ($log says why): using pip instead"
        use_uv=no
        with_pip "$@" || status=$?
    fi
    kill "$ticker" 2>/dev/null || true
    [ "$status" -eq 0 ] && return
    write_stamp failed
    tail -n "+$pip_starts" "$log" | grep -v -E '^ *(WARNING.*)?$' | tail -n 12 >&2 || true
    die "\`pip install $*\` failed (above, the end of its output; $log has all of it):" \
        "fix what it names (the network, a proxy, the disk) and run env_setup.sh again."
}

# pip's settings (from its files and PIP_ variables), NAME=VALUE a line; of two, the last counts.
pip_settings() {
    "$venv/bin/python" -m pip config list 2>>"$log" |
        sed -n -E "s/^global\./1/p; s/^install\./2/p; s/^:env:\./3/p" | sort |
        sed -E "s/^.//; s/=['\"](.*)['\"]$/=\1/; s/\\\\n/ /g"
}

# Passes pip's settings on to uv, which does not read them. Fails if uv cannot follow one.
follow_pip_settings() {
    local setting value
    while IFS= read -r setting; do
        value=${setting#*=}
        case ${setting%%=*} in
            index-url) export UV_INDEX_URL=$value ;;
            extra-index-url) export UV_EXTRA_INDEX_URL=$value ;;
            find-links) export UV_FIND_LINKS=${value// /,} ;;
            constraint) export UV_CONSTRAINT=$value ;;
            trusted-host) export UV_INSECURE_HOST=$value ;;
            timeout | default-timeout) export UV_HTTP_TIMEOUT=$value ;;
            proxy) export HTTP_PROXY=$value HTTPS_PROXY=$value ;;
            cert) export SSL_CERT_FILE=$value ;;
            no-cache-dir) uv_cache=$venv/tmp/uv ;; # for this run only
            # These do not change what is installed, or from where.
            cache-dir | retries | prefer-binary | no-compile | no-input | quiet | verbose) ;;
            log | progress-bar | no-color | root-user-action | user | break-system-packages) ;;
            require-virtualenv | disable-pip-version-check | no-python-version-warning) ;;
            *)
                say "uv cannot follow pip's setting ${setting%%=*}: using pip instead"
                return 1
                ;;
        esac
    done < <(pip_settings)
    export UV_INDEX_STRATEGY=unsafe-best-match # pip, too, looks in every index
}

# uv's own cache, if hard links between it and .venv work, so that it takes no disk of its own;
# else a folder in .venv, for this run.
find_uv_cache() {
    local cache probe
    cache=$("$venv/bin/uv" cache dir 2>>"$log") || cache=
    probe=$cache/env_setup.probe
    if { mkdir -p "$cache" && ln -f "$log" "$probe" && rm "$probe"; } 2>/dev/null; then
        echo "$cache"
    else
        echo "$venv/tmp/uv"
    fi
}

# Sets use_uv.
find_uv() {
    use_uv=no
    follow_pip_settings || return 0
    if ! with_pip --only-binary :all: "$INSTALLER" || ! "$venv/bin/uv" --version >>"$log" 2>&1; then
        say "uv cannot be installed ($log says why): using pip instead"
        return
    fi
    use_uv=yes
    export UV_NO_CONFIG=1 UV_CACHE_DIR=${uv_cache:-$(find_uv_cache)}
    # uv leaves compiling to the first import; with this set, imports would not save the result.
    [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || export UV_COMPILE_BYTECODE=1
}

pins() { grep -E "^($1)==" requirements.txt; }

install() {
    local torch=() build_tools=()
    mapfile -t build_tools < <(pins setuptools)
    mapfile -t torch < <(pins 'torch|torchvision')
    rm -rf "$venv/tmp"
    mkdir "$venv/tmp"
    # DeepSpeed is built without its compiled operations; it asks for an accelerator even so.
    # Downloads are unpacked inside .venv: /tmp may be small.
    export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu PIP_USER=0 TMPDIR=$venv/tmp
    use_uv=no
    install_step "the build tools" "${build_tools[@]}"
    find_uv
    install_step "torch and torchvision (the largest part)" \
        ${torch_index:+--index-url "$torch_index"} "${torch[@]}"
    install_step "the other packages of requirements.txt" --no-build-isolation -r requirements.txt
    install_step "mixgrpo" --no-deps --no-build-isolation -e .
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
        say "rebuilding .venv: it is incomplete, was moved, or is for another Python or torch index"
    fi
    make_venv
fi
write_stamp installing
install
write_stamp "$contents"
say "ready: .venv has $("$venv/bin/python" -m pip list --format freeze 2>/dev/null | wc -l) packages"

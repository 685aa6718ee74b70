#!/usr/bin/env bash
# Installs what is missing and runs a command of mixgrpo, a process on each GPU, or one on the CPU:
#   bash scripts/launch.sh COMMAND [options]
# on this machine, or on those of hosts/hostfile if that names others.
# Environment variables: PROCESSES sets another number (on each host), HOSTFILE another file.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

bash env_setup.sh

exec .venv/bin/python -m mixgrpo hosts --hostfile "${HOSTFILE:-hosts/hostfile}" "$@"

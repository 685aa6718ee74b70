#!/usr/bin/env bash
# Installs what is missing and runs a command of mixgrpo, one process per GPU or one on the CPU:
#   bash scripts/launch.sh COMMAND [options]
# It runs on this machine or, if hosts/hostfile names other hosts, on those.
# Environment variables: PROCESSES sets the number of processes per host, HOSTFILE the host file.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

bash env_setup.sh

exec .venv/bin/python -m mixgrpo hosts --hostfile "${HOSTFILE:-hosts/hostfile}" "$@"

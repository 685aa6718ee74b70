#!/usr/bin/env bash
# Installs what is missing and runs a command of mixgrpo on this machine, a process on each GPU, or
# one on the CPU: bash scripts/launch.sh COMMAND [options]. PROCESSES sets another number.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

bash env_setup.sh

gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}

exec .venv/bin/python -m mixgrpo launch --nproc_per_node "$processes" "$@"

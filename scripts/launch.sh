#!/usr/bin/env bash
# Installs what is missing and runs a command of mixgrpo, a process on each GPU, or one on the CPU:
#   bash scripts/launch.sh COMMAND [options]
# on this machine, or on those of hosts/hostfile if that names others.
# Environment variables: PROCESSES sets another number (on each host), HOSTFILE another file.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

bash env_setup.sh

hostfile=${HOSTFILE:-hosts/hostfile}
if [ -n "${HOSTFILE:-}" ] || grep -qsvE '^[[:space:]]*(#.*|localhost[[:space:]]*(#.*)?)?$' "$hostfile"; then
    exec .venv/bin/python -m mixgrpo hosts --hostfile "$hostfile" "$@"
fi

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}

exec .venv/bin/python -m mixgrpo launch --nproc_per_node "$processes" "$@"

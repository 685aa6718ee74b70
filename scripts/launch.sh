#!/usr/bin/env bash
# Installs what is missing and runs a command of mixgrpo on this machine, a process on each GPU, or
# one on the CPU: bash scripts/launch.sh COMMAND [options]. PROCESSES sets another number.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

bash env_setup.sh

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}

exec .venv/bin/python -m mixgrpo launch --nproc_per_node "$processes" "$@"

#!/usr/bin/env bash
# Pictures of FLUX.1-dev, base or tuned, on all GPUs: bash scripts/inference/inference_flux.sh [overrides]
#   bash scripts/inference/inference_flux.sh --folder runs/tuned --checkpoint runs/flux_mixgrpo/model
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

bash env_setup.sh

# One process on each GPU; without any, one on the CPU.
gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')

.venv/bin/python -m mixgrpo launch --nproc_per_node "$((gpus > 0 ? gpus : 1))" \
    sample --recipe flux "$@"

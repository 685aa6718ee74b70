#!/usr/bin/env bash
# Pictures of FLUX.1-dev, base or tuned, on every GPU or on the CPU:
#   bash scripts/inference/inference_flux.sh --folder runs/tuned --checkpoint runs/flux_mixgrpo/model
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" sample --recipe flux "$@"

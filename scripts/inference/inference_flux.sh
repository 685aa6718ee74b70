#!/usr/bin/env bash
# Samples images from FLUX.1-dev, base or fine-tuned, on all GPUs or on the CPU; --recipe replaces
# the default scripts/inference/flux.yaml:
#   bash scripts/inference/inference_flux.sh --folder runs/tuned --checkpoint runs/flux_mixgrpo/model
set -euo pipefail
recipe=(--recipe flux)
[[ " $* " == *" --recipe"[\ =]* ]] && recipe=()
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" sample "${recipe[@]}" "$@"

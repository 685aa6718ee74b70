#!/usr/bin/env bash
# Pictures of FLUX.1-dev, base or tuned, on every GPU or on the CPU; a --recipe of yours counts
# instead of scripts/inference/flux.yaml:
#   bash scripts/inference/inference_flux.sh --folder runs/tuned --checkpoint runs/flux_mixgrpo/model
set -euo pipefail
recipe=(--recipe flux)
[[ " $* " == *" --recipe"[\ =]* ]] && recipe=()
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" sample "${recipe[@]}" "$@"

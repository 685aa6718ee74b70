#!/usr/bin/env bash
# Fine-tunes FLUX.1-dev by MixGRPO on the GPUs of this machine or of those in hosts/hostfile, or on
# the CPU; a --recipe of yours counts instead of flux_mixgrpo:
#   bash scripts/finetune/finetune_flux_mixgrpo.sh --model.train lora --batch.prompts 8
set -euo pipefail
recipe=(--recipe flux_mixgrpo)
[[ " $* " == *" --recipe"[\ =]* ]] && recipe=()
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" train "${recipe[@]}" "$@"

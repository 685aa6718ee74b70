#!/usr/bin/env bash
# Fine-tunes FLUX.1-dev with DanceGRPO on this machine's GPUs, or on the CPU; --recipe replaces the
# default recipe flux_dancegrpo:
#   bash scripts/finetune/finetune_flux_dancegrpo.sh --model.train lora --batch.prompts 8
set -euo pipefail
recipe=(--recipe flux_dancegrpo)
[[ " $* " == *" --recipe"[\ =]* ]] && recipe=()
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" train "${recipe[@]}" "$@"

#!/usr/bin/env bash
# Fine-tunes FLUX.1-dev with MixGRPO on the GPUs of this machine or of the hosts in hosts/hostfile,
# or on the CPU; --recipe replaces the default recipe flux_mixgrpo:
#   bash scripts/finetune/finetune_flux_mixgrpo.sh --model.train lora --batch.prompts 8
set -euo pipefail
recipe=(--recipe flux_mixgrpo)
[[ " $* " == *" --recipe"[\ =]* ]] && recipe=()
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" train "${recipe[@]}" "$@"

#!/usr/bin/env bash
# Fine-tunes Qwen-Image with MixGRPO for text rendering on the GPUs of this machine or of the hosts
# in hosts/hostfile, or on the CPU; --recipe replaces the default recipe qwen_image_mixgrpo_ocr:
#   bash scripts/finetune/finetune_qwen_image_mixgrpo_ocr.sh --rewards.text.options.urls http://reader:8000
set -euo pipefail
recipe=(--recipe qwen_image_mixgrpo_ocr)
[[ " $* " == *" --recipe"[\ =]* ]] && recipe=()
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" train "${recipe[@]}" "$@"

#!/usr/bin/env bash
# Samples images from Qwen-Image, base or fine-tuned, on all GPUs or on the CPU; --recipe replaces
# the default scripts/inference/qwen_image.yaml:
#   bash scripts/inference/inference_qwen_image.sh --checkpoint runs/qwen_image_mixgrpo_ocr/model
set -euo pipefail
recipe=(--recipe qwen_image)
[[ " $* " == *" --recipe"[\ =]* ]] && recipe=()
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" sample "${recipe[@]}" "$@"

#!/usr/bin/env bash
# Encodes prompts for Qwen-Image, on all GPUs or on the CPU:
#   bash scripts/preprocess/preprocess_qwen_image.sh --prompts_files my_prompts.txt --output data/my_embeddings
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" preprocess \
    --model.path data/models/Qwen-Image --model.text_length 256 \
    --prompts_files data/ocr/prompts.txt data/ocr/prompts_test.txt \
    --output data/embeddings/qwen_image "$@"

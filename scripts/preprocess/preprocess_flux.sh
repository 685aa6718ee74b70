#!/usr/bin/env bash
# Encodes prompts for FLUX.1-dev, on all GPUs or on the CPU:
#   bash scripts/preprocess/preprocess_flux.sh --prompts_files my_prompts.txt --output data/my_embeddings
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" preprocess \
    --model.path data/models/FLUX.1-dev \
    --prompts_files data/prompts.txt data/prompts_test.txt \
    --output data/embeddings/flux "$@"

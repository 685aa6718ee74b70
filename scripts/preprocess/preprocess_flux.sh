#!/usr/bin/env bash
# Encodes prompts on every GPU: bash scripts/preprocess/preprocess_flux.sh [preprocess's options]
#   bash scripts/preprocess/preprocess_flux.sh --prompts_files my_prompts.txt --output data/my_embeddings
# PROCESSES sets how many processes share the work; without it one per GPU, or one on the CPU.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

bash env_setup.sh

gpus=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}

.venv/bin/python -m mixgrpo launch --nproc_per_node "$processes" preprocess \
    --model.path data/models/FLUX.1-dev \
    --prompts_files data/prompts.txt data/prompts_test.txt \
    --output data/embeddings/flux "$@"

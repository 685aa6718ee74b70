#!/usr/bin/env bash
# Scores and compares pictures on all GPUs, or on the CPU where there is none:
#   bash scripts/evaluate/eval_reward.sh runs/base_pictures runs/tuned_pictures \
#       --recipe shapes_mixgrpo --output runs/evaluation
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

bash env_setup.sh

gpus=$(.venv/bin/python -c "import torch; print(torch.cuda.device_count())")
exec .venv/bin/python -m mixgrpo launch --nproc_per_node "$((gpus > 0 ? gpus : 1))" evaluate "$@"

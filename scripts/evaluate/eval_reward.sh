#!/usr/bin/env bash
# Scores and compares sampled images, on all GPUs or on the CPU:
#   bash scripts/evaluate/eval_reward.sh runs/base_pictures runs/tuned_pictures \
#       --recipe shapes_mixgrpo --output runs/evaluation
set -euo pipefail
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../launch.sh" evaluate "$@"

#!/usr/bin/env bash
# The paper's comparison in miniature, on the Shapes world: every recipe, the ablations, the tables.
#   bash scripts/benchmark/family.sh                  # 85 minutes; again, it goes on where it was
#   bash scripts/benchmark/family.sh --report-only    # tables and plots from the committed results
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
bash env_setup.sh
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
exec .venv/bin/python scripts/benchmark/family.py "$@"

#!/usr/bin/env bash
# The paper's comparison in miniature, on the Shapes world: all recipes, ablations and tables.
#   bash scripts/benchmark/family.sh                  # 85 minutes; run it again to continue
#   bash scripts/benchmark/family.sh --report-only    # tables and plots from the committed results
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
bash env_setup.sh
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
exec .venv/bin/python scripts/benchmark/family.py "$@"

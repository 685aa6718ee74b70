#!/usr/bin/env bash
# Proves and measures on one GPU, in nine minutes: bash scripts/benchmark/gpu.sh [--help]
# It needs a Python with torch and mixgrpo's packages, and nothing else: $PYTHON, else .venv's if
# env_setup.sh made one, else python3. Nothing is downloaded or installed.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=$root/.venv/bin/python
    [ -x "$python" ] || python=python3
fi
export PYTHONPATH=$root/scripts/benchmark:$root${PYTHONPATH:+:$PYTHONPATH}
export TOKENIZERS_PARALLELISM=false
exec "$python" -m gpu "$@"

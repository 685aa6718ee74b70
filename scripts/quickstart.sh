#!/usr/bin/env bash
# Installs what is missing and fine-tunes the Shapes model: bash scripts/quickstart.sh [overrides]
#   bash scripts/quickstart.sh --window.size 2
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

bash env_setup.sh
installed=$SECONDS
echo "quickstart: installing took $installed s"

folder=runs/quickstart
for ((n = 2; ; n++)); do
    [ -e "$folder" ] || break
    folder=runs/quickstart-$n
done

# The model is small: two processes on half of the cores each are faster than one on all of them,
# and a GPU is faster with one.
processes=1
if [ "$(nproc)" -ge 2 ] && ! nvidia-smi -L >/dev/null 2>&1; then
    processes=2
fi

trap 'echo "quickstart: training took $((SECONDS - installed)) s"' EXIT
.venv/bin/python -m mixgrpo launch --nproc_per_node "$processes" \
    train --recipe shapes_mixgrpo --run.folder "$folder" "$@"

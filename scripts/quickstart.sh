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

# Threads that wait sleep: spinning, they starve training as soon as the machine does anything else.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

trap 'echo "quickstart: training took $((SECONDS - installed)) s"' EXIT
.venv/bin/python -m mixgrpo train --recipe shapes_mixgrpo --run.folder "$folder" "$@"

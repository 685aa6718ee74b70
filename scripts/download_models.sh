#!/usr/bin/env bash
# Fetches models and prompts from Hugging Face: bash scripts/download_models.sh NAME ...
#   bash scripts/download_models.sh --help
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

if [ ! -x .venv/bin/python ]; then
    echo "download_models.sh: there is no .venv yet, which holds the program \`hf\`:" \
        "run \`bash env_setup.sh\` first." >&2
    exit 1
fi
export PATH="$PWD/.venv/bin:$PATH"

exec .venv/bin/python -m mixgrpo download "$@"

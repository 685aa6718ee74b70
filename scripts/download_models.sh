#!/usr/bin/env bash
# Downloads models and prompts from Hugging Face: bash scripts/download_models.sh NAME ...
#   bash scripts/download_models.sh --help
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

if [ ! -x .venv/bin/python ]; then
    echo "download_models.sh: the environment .venv, which provides \`hf\`, does not exist yet;" \
        "run \`bash env_setup.sh\` first." >&2
    exit 1
fi
export PATH="$PWD/.venv/bin:$PATH"

exec .venv/bin/python -m mixgrpo download "$@"

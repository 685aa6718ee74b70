#!/usr/bin/env bash
# Compares the hosts of hosts/hostfile: whether they can be reached, Python, packages, revision, the
# data that a recipe names, clocks and GPUs; then tries an all-reduce among them. It accepts the
# options of a training: bash scripts/hosts/check.sh --recipe shapes_mixgrpo
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
bash env_setup.sh
recipe=(--recipe flux_mixgrpo)
[[ " $* " == *" --recipe"[\ =]* ]] && recipe=()
exec .venv/bin/python -m mixgrpo hosts ${HOSTFILE:+--hostfile "$HOSTFILE"} check "${recipe[@]}" "$@"

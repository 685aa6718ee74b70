#!/usr/bin/env bash
# Installs what is missing and runs the tests: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

bash env_setup.sh

# The tests' models are tiny: two threads are all they can use, and some tests start two processes.
# Threads that wait must then sleep: spinning, two processes on two cores were 20 times slower.
cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 2 ? cores : 2))}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

exec .venv/bin/python -m pytest "$@"

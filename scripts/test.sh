#!/usr/bin/env bash
# Installs what is missing and runs the tests: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

bash env_setup.sh

# The tests' models are tiny: a thread is all they can use, and so the cores run tests side by side.
# Threads that wait must sleep: some tests start two processes, and spinning, two processes on two
# cores were 20 times slower.
cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

exec .venv/bin/python -m pytest --numprocesses "$((cores < 4 ? cores : 4))" --dist worksteal "$@"

#!/usr/bin/env bash
# Runs every check:  ./run_tests.sh [options of pytest, such as -k NAME]
#                    ./run_tests.sh --faults [options]     the long set instead
#
# Makes .venv first if it is not there. Stops at the first check that fails, with its exit code.
# SHARDMILL_PYTHON=/path/to/python uses that environment instead.
set -euo pipefail

root="$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" >/dev/null && pwd)"
readonly root
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

check() {
  printf '\n$ %s\n' "$*"
  "$python" -m "$@"
}

ensure_environment test
cd -- "$root"
check ruff check .
check ruff format --check .
check mypy
# Two at a time: most of a test with Ray is waiting for processes to start.
two_at_a_time=(-n 2 --dist worksteal)
if [[ "${1:-}" == --faults ]]; then
  check pytest -q -rs "${two_at_a_time[@]}" -m faults "${@:2}"
else
  check pytest -q -rs "${two_at_a_time[@]}" "$@"
fi

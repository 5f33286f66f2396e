#!/usr/bin/env bash
# Runs or continues a job:  ./run_job.sh JOB.yaml [options of `shardmill run`]
#
# Makes .venv first if it is not there. Fit for cron: needs no terminal, no HOME and no particular
# current folder. Paths among the arguments are relative to the caller's folder. The exit code is
# that of `shardmill run` (75: run the same command again), or 69 or 73 if .venv cannot be made.
# SHARDMILL_PYTHON=/path/to/python uses that environment instead.
set -euo pipefail

root="$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" >/dev/null && pwd)"
readonly root
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

ensure_environment run
# -P: a folder named `jobs` where the caller happens to stand is not ours. exec: signals arrive.
exec "$python" -P -m jobs run "$@"

#!/usr/bin/env bash
# Runs or continues a job:  ./run_job.sh JOB.yaml [options of `shardmill run`]
#
# Makes .venv first if it is not there. Fit for cron: needs no terminal, no HOME and no particular
# current folder, PATH or umask. Paths among the arguments are relative to the caller's folder.
#
# The exit code is that of `shardmill run` (75: run the same command again; also if another start
# has the run folder, which is locked), or 69 or 73 if .venv or the log cannot be made. This process
# becomes the job, so signals that are sent to it reach the job.
#
# SHARDMILL_PYTHON=/path/to/python uses that environment instead.
# SHARDMILL_LOG=/path/to/log appends all output to that file; at 10 MiB it becomes .1, then .2, .3.
set -euo pipefail

root="$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" >/dev/null && pwd)"
readonly root
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
# shellcheck source=scripts/job_log.sh
source "$root/scripts/job_log.sh"

[[ -z "${SHARDMILL_LOG:-}" ]] || write_to_log "$SHARDMILL_LOG"
ensure_environment run
# -P: a folder named `jobs` where the caller happens to stand is not ours. exec: signals arrive.
exec "$python" -P -m jobs run "$@"

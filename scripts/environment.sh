# shellcheck shell=bash
# Sourced by run_job.sh and run_tests.sh, which set $root to the project's folder first.
#
#   ensure_environment run|test    sets $python to an interpreter with all that a job (or the
#                                  tests) need; makes or renews .venv where that is necessary
#
# .venv/shardmill/ holds the lock, install.log and one stamp for each of the two. A stamp is a
# copy of what was installed, and it is written last: a .venv without one was interrupted, and is
# made anew. The lock is taken on file descriptor 9, which a killed start gives back by itself.

readonly oldest_minor=11 newest_minor=14 # Python 3.x; every pinned requirement has wheels for these
readonly lock_minutes=30

readonly unavailable=69 cannot_create=73 try_again=75 # exit codes, as in <sysexits.h>

readonly venv="${root:?}/.venv"
readonly state="$venv/shardmill"
readonly log="$state/install.log"

say() { printf 'shardmill: %s\n' "$*" >&2; }

die() { # die EXIT_CODE SENTENCE
  say "$2"
  exit "$1"
}

ensure_environment() { # ensure_environment run|test
  if [[ -n "${SHARDMILL_PYTHON:-}" ]]; then
    use_given_python "$1"
    return
  fi
  python="$venv/bin/python"
  if ! is_current "$1"; then
    find_python
    take_lock
    is_current run || install_run
    [[ "$1" == run ]] || is_current test || install_test
    exec 9>&- # the job must not hold the lock
  fi
  # What is in .venv was chosen to fit together; another Python's packages must not come first.
  unset PYTHONPATH PYTHONHOME
  export PATH="$venv/bin:$PATH"
}

# --- SHARDMILL_PYTHON: an environment that somebody else looks after ---------------------------

use_given_python() {
  python="$(command -v -- "$SHARDMILL_PYTHON")" ||
    die "$unavailable" "SHARDMILL_PYTHON=$SHARDMILL_PYTHON cannot be run: give the path of a Python 3.$oldest_minor or newer."
  [[ "$python" == /* ]] || python="$PWD/$python"
  if ! probe_python "$python" || ((probed_minor < oldest_minor)); then
    die "$unavailable" "SHARDMILL_PYTHON=$SHARDMILL_PYTHON is not a Python 3.$oldest_minor or newer."
  fi

  local missing extra=()
  [[ "$1" == run ]] || extra=("$1")
  missing="$("$python" -P "$root/scripts/missing_requirements.py" "$root/pyproject.toml" ${extra[@]+"${extra[@]}"})" ||
    die "$unavailable" "SHARDMILL_PYTHON=$SHARDMILL_PYTHON could not be asked what is installed."
  [[ -z "$missing" ]] ||
    die "$unavailable" "SHARDMILL_PYTHON=$SHARDMILL_PYTHON lacks $missing: install that there, or unset SHARDMILL_PYTHON to let this script make .venv."
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}

# --- finding a Python to start from ------------------------------------------------------------

readonly probe='
import sys
from importlib.util import find_spec
print(*sys.version_info[:3], int(all(map(find_spec, ("venv", "ensurepip")))))'

probe_python() { # sets probed_minor, probed_micro and probed_venv (0 or 1); fails on Python 2
  local major
  read -r major probed_minor probed_micro probed_venv \
    < <("$1" -I -c "$probe" 2>/dev/null </dev/null) && [[ "$major" == 3 ]]
}

find_python() { # sets base_python
  local name path seen="" without_venv=""
  for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
    path="$(type -P "$name")" || continue
    probe_python "$path" || continue
    seen+="${seen:+, }$name is 3.$probed_minor.$probed_micro"
    ((probed_minor >= oldest_minor && probed_minor <= newest_minor)) || continue
    if ((probed_venv)); then
      base_python="$path"
      return
    fi
    without_venv="${without_venv:-$path}"
  done
  [[ -z "$without_venv" ]] ||
    die "$unavailable" "$without_venv has no venv and ensurepip modules: install them (on Debian and Ubuntu: apt-get install python3-venv)."
  die "$unavailable" "no Python 3.$oldest_minor to 3.$newest_minor on PATH (${seen:-no python3 at all}): install one, or set SHARDMILL_PYTHON."
}

# --- .venv -------------------------------------------------------------------------------------

inputs_of() { # all that decides what is installed for run|test
  local files=("$root/pyproject.toml" "$root/requirements.txt")
  [[ "$1" == run ]] || files+=("$root/requirements-test.txt")
  printf '%s\n' "$root" # a folder that was moved or copied has the old path inside its .venv
  cat -- "${files[@]}"
}

is_current() { # is .venv ready for run|test?
  [[ -f "$state/$1.stamp" && "$(inputs_of "$1")" == "$(<"$state/$1.stamp")" ]] && venv_works
}

venv_works() { # not so when the Python it was made from is gone, or is another by now
  "$venv/bin/python" -I -c 'import importlib.util as u; raise SystemExit(not u.find_spec("setuptools"))' \
    >/dev/null 2>&1 </dev/null
}

take_lock() {
  local content # looked at once: another start may be filling .venv at this moment
  content="$(ls -A -- "$venv/" 2>/dev/null || true)"
  if [[ -n "$content" ]] && ! grep -qx -- "${state##*/}" <<<"$content"; then
    die "$unavailable" "$venv was not made by this script: move it away, or use it as it is with SHARDMILL_PYTHON=$venv/bin/python."
  fi
  { mkdir -p -- "$state" && : >>"$state/lock"; } 2>/dev/null ||
    die "$cannot_create" "$venv cannot be written: make the folder writable, or set SHARDMILL_PYTHON to a Python that has the requirements."
  exec 9>>"$state/lock"
  "$base_python" -I "$root/scripts/lock_descriptor.py" 9 "$lock_minutes" </dev/null ||
    die "$try_again" "another start has been making $venv for $lock_minutes minutes, or it cannot be locked: try again, or delete it."
}

install_run() {
  if can_be_renewed; then
    say "renewing $venv, because the requirements have changed ..."
    : >"$log"
  else
    say "making $venv (first run only; about two minutes, more where the CUDA libraries must come over the network) ..."
    make_venv
  fi
  rm -f -- "$state/run.stamp" "$state/test.stamp"
  pip_install --requirement "$root/requirements.txt"
  pip_install --no-deps --no-build-isolation --editable "$root"
  write_stamp run
}

install_test() {
  say "adding the test tools to $venv ..."
  pip_install --requirement "$root/requirements-test.txt"
  write_stamp test
}

can_be_renewed() { # complete, and made in this folder
  [[ -f "$state/run.stamp" && "$(head -n 1 -- "$state/run.stamp")" == "$root" ]] && venv_works
}

make_venv() {
  rm -f -- "$state/run.stamp" "$state/test.stamp"
  find "$venv/" -mindepth 1 -maxdepth 1 ! -name "${state##*/}" -exec rm -rf -- {} + ||
    die "$cannot_create" "what is left of $venv cannot be removed: delete it, or make it writable."
  "$base_python" -I -m venv "$venv" >"$log" 2>&1 </dev/null ||
    fail_to_install "$base_python could not make $venv"
}

pip_install() {
  # PIP_USER: a `user = true` in somebody's settings does not work inside a .venv.
  PIP_USER=false "$venv/bin/python" -I -m pip install --no-input --progress-bar off \
    --disable-pip-version-check "$@" >>"$log" 2>&1 </dev/null ||
    fail_to_install "pip could not install the requirements"
}

fail_to_install() { # fail_to_install SENTENCE_START; looks for the reason in the log's end
  local end
  end="$(tail -n 15 -- "$log" | sed 's/^/  | /')"
  printf '%s\n' "$end" >&2
  if grep -qiE 'no space left on device|disk quota exceeded' <<<"$end"; then
    die "$cannot_create" "$1, because the disk is full (all of it in $log)."
  elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError' <<<"$end"; then
    die "$unavailable" "$1, because no package index could be reached: check the network and pip's settings (all of it in $log)."
  fi
  die "$unavailable" "$1: see above, and all of it in $log."
}

write_stamp() {
  inputs_of "$1" >"$state/$1.stamp.new"
  mv -f -- "$state/$1.stamp.new" "$state/$1.stamp"
}

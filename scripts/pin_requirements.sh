#!/usr/bin/env bash
# Makes requirements.txt and requirements-test.txt again from pyproject.toml; needs `uv`.
#
#   scripts/pin_requirements.sh              what is pinned stays, new requirements are added
#   scripts/pin_requirements.sh --upgrade    everything as new as its range allows
#
# torch is pinned here and not upgraded: its CUDA build needs a driver that fits. What its metadata
# asks for on top (nvidia-*, cuda-*, triton) is left out: it pins those itself, and a CPU build of
# the same release has none of them.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

readonly torch="torch==2.13.0"

pin() { # pin OUTPUT TITLE [ARGUMENT OF uv]...
  local output="$1" title="$2" body
  shift 2
  : >"$scratch/pins.txt"
  [[ ! -f "$output" ]] || cp -- "$output" "$scratch/pins.txt"
  uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links --output-file "$scratch/pins.txt" "$@"
  body="$(grep -vE "^(nvidia-|cuda-|triton==)|sys_platform == '(win32|emscripten)'" "$scratch/pins.txt")"
  cat >"$output" <<EOF
# $title
# Pinned for Python 3.11 to 3.14 on Linux and macOS by scripts/pin_requirements.sh, from
# pyproject.toml: change that, then run it again.
$body
EOF
}

scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT
printf '%s\n' "$torch" >"$scratch/torch.in"
printf '%s\n' "setuptools>=77" >"$scratch/build.in"

pin requirements.txt "What run_job.sh installs. Without nvidia-*, cuda-* and triton: a CUDA build of torch
# pins those itself, and a CPU build has none of them." "$@" pyproject.toml "$scratch/torch.in" "$scratch/build.in"
python3 - >"$scratch/test.in" <<'EOF'
import pathlib, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text("utf-8"))["project"]
print("\n".join(project["optional-dependencies"]["test"]))
EOF
pin requirements-test.txt "What run_tests.sh installs on top of requirements.txt." "$@" \
  --constraints requirements.txt "$scratch/test.in"

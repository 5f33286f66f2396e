# shellcheck shell=bash
# Sourced by run_job.sh, after environment.sh.
#
#   write_to_log FILE    from here on all output is appended to FILE; makes its folder

readonly full_log=20480 # blocks of 512 bytes: 10 MiB
readonly kept_logs=3

write_to_log() {
  local file="$1"
  [[ "$file" == /* ]] || file="$PWD/$file"
  { mkdir -p -- "$(dirname -- "$file")" && : >>"$file"; } 2>/dev/null ||
    die "$cannot_create" "SHARDMILL_LOG=$file cannot be written: name another file, or make its folder writable."
  rotate_log "$file"
  exec >>"$file" 2>&1

  say "started by run_job.sh, $(printf '%(%Y-%m-%d %H:%M:%S)T' -1), process $$"
}

rotate_log() { # a start that is still writing goes on in the file it has open
  [[ -f "$1" && -n "$(find "$1" -prune -size "+$full_log")" ]] || return 0
  local number
  for ((number = kept_logs; number > 1; number--)); do
    [[ ! -e "$1.$((number - 1))" ]] || mv -f -- "$1.$((number - 1))" "$1.$number"
  done
  mv -f -- "$1" "$1.1" 2>/dev/null || true # another start may have been faster
}

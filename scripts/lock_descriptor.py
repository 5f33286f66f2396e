"""Lock a file descriptor that the calling shell has open, and leave it locked.

    python lock_descriptor.py DESCRIPTOR MINUTES

The lock belongs to the open file, not to this process: it lasts until the shell and its children
have closed it, however they end. Needs no `flock` program. Exits 1 if MINUTES were not enough.
"""

import fcntl
import sys
import time


def main(descriptor: int, minutes: float) -> int:
    if try_lock(descriptor):
        return 0
    print("shardmill: waiting for another start that is making .venv ...", file=sys.stderr)
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if try_lock(descriptor):
            return 0
    return 1


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))

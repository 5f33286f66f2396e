"""What cron does with a crontab's line, without waiting for the minute."""

from __future__ import annotations

import subprocess
from pathlib import Path


def as_cron(line: str) -> str:
    r"""The command of a line as cron hands it to sh: up to a %, unless that is a `\%`."""
    result, is_escaped = "", False
    for character in line.split(" ", 5)[5]:
        if character == "%" and not is_escaped:
            break
        result = result[:-1] + character if character == "%" else result + character
        is_escaped = character == "\\" and not is_escaped
    return result


def start_as_cron(line: str, home: Path) -> subprocess.Popen[bytes]:
    """Starts a line's command as cron does; cron would mail what lands in `home`/mail."""
    environment = {"HOME": str(home), "LOGNAME": "me", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
    with (home / "mail").open("ab") as mail:
        return subprocess.Popen(
            ["/bin/sh", "-c", as_cron(line)],
            cwd=home,
            env=environment,
            umask=0o077,
            stdin=subprocess.DEVNULL,
            stdout=mail,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

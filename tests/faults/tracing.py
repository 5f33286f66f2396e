"""Faults by strace: death at, or failure of, the n-th system call of a kind."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.steps import make_input
from tests.faults.zygote import UNTRACED

ROOT = Path(__file__).parents[2]
_CALL = re.compile(r"^(\d+) +(\w+)\(")


@dataclass
class Ended:
    """How a traced child ended.

    Attributes:
        code: its exit code, or minus the signal.
        log: one line for each system call that was looked at.
    """

    code: int
    log: list[str]

    def counts(self) -> Counter[str]:
        """By name, how often the busiest thread made the call: strace counts for each thread."""
        by_thread = Counter((m[1], m[2]) for line in self.log if (m := _CALL.match(line)))
        counts: Counter[str] = Counter()
        for (_, name), count in by_thread.items():
            counts[name] = max(counts[name], count)
        return counts


@dataclass
class Tracer:
    """Runs `commit_and_roll_up` under strace, in a child of one zygote.

    Attributes:
        scratch: a folder for logs.
    """

    scratch: Path
    _zygote: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def close(self) -> None:
        """Ends the zygote."""
        self._zygote.communicate()

    def why_not(self) -> str | None:
        """Why nothing can be traced here, or None."""
        if shutil.which("strace") is None:
            return "strace is not installed"
        if self.run(self.scratch / "probe", "fsync").code == UNTRACED:
            return "strace may not attach to a process here (no CAP_SYS_PTRACE)"
        return None

    def run(self, folder: Path, calls: str, inject: str = "") -> Ended:
        """One run in `folder`.

        Args:
            folder: where `commit_and_roll_up` works; made if it is not there.
            calls: system calls to look at, as strace's `trace=` takes them.
            inject: the fault, as strace's `inject=` takes it; none when empty.
        """
        make_input(folder)
        log = self.scratch / "strace.log"
        log.unlink(missing_ok=True)
        child = self._tell(str(folder))
        options = ["-f", "-y", "-qq", "-o", str(log), "-e", f"trace={calls}"]
        options += ["-e", f"inject={inject}"] if inject else []
        strace = subprocess.run(
            ["strace", *options, "-p", child], stderr=subprocess.PIPE, text=True, check=False
        )
        code = int(self._answer())
        assert code in (UNTRACED, 0) or log.exists(), strace.stderr
        return Ended(code, log.read_text(errors="replace").splitlines() if log.exists() else [])

    def _tell(self, line: str) -> str:
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(line + "\n")
        self._zygote.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._zygote.stdout is not None
        return self._zygote.stdout.readline().strip()

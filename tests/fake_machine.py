"""A machine on which run_job.sh and run_tests.sh run, with fake Pythons on PATH and no network.

The scripts run in a copy of the project whose path has a space in it, without HOME and with
nothing on PATH but the tools they may rely on, as under cron.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = ["bash", "cat", "dirname", "find", "grep", "head", "ls", "mkdir", "mv", "readlink", "rm"]
TOOLS += ["sed", "tail"]
FAKES_TOOLS = ["ln", "sleep", "touch"]

# Plays a Python, its venv and pip modules and the job; notes pip's calls and the job's arguments.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *version_info*) echo "{version} {has_venv}" ;;
  *lock_descriptor.py*) exec "{real_python}" "$@" ;;
  *missing_requirements.py*) echo "{missing}" ;;
  *find_spec*) exit 0 ;;
  *"-m venv"*) mkdir -p "${{@: -1}}/bin"; ln -sf "$0" "${{@: -1}}/bin/python" ;;
  *"-m pip"*) echo "$*" >>"{notes}/pip"; {pip} ;;
  *"-m jobs"*) printf '%s\\n' "$$" "$PWD" "$@" >"{notes}/job"; {job} ;;
  *) echo "$*" >>"{notes}/checks"; {check} ;;
esac
"""


@dataclass
class Machine:
    """A copy of the project, and a PATH on which only the fakes are found."""

    folder: Path
    project: Path = field(init=False)
    bin: Path = field(init=False)
    notes: Path = field(init=False)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.project, self.bin, self.notes = (
            self.folder / name for name in ("the project", "bin", "notes")
        )
        for folder in (self.project, self.bin, self.notes):
            folder.mkdir()
        for name in ("run_job.sh", "run_tests.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.project)
        for path in ROOT.glob("requirements*.txt"):
            shutil.copy(path, self.project)
        shutil.copytree(ROOT / "scripts", self.project / "scripts")
        for tool in TOOLS + FAKES_TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)

    def add_python(self, name: str = "python3", **behaviour: str) -> Path:
        settings = {
            "version": "3 12 1",
            "has_venv": "1",
            "missing": "",
            "pip": "exit 0",
            "job": "exit 0",
            "check": "exit 0",
            "real_python": sys.executable,
            "notes": str(self.notes),
        }
        path = self.bin / name
        path.write_text(FAKE_PYTHON.format(**settings | behaviour))
        path.chmod(0o755)
        return path

    def start(
        self, *arguments: str | Path, cwd: Path | None = None, **env: str | Path
    ) -> subprocess.Popen[str]:
        command, *rest = arguments or ("run_job.sh", "job.yaml")
        process = subprocess.Popen(
            [self.project / command, *rest],
            cwd=cwd or self.folder,
            env={"PATH": str(self.bin)} | {name: str(value) for name, value in env.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def kill(self, process: subprocess.Popen[str]) -> None:
        """Kill a start with all its children, if any is left, and wait for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, **env: str | Path
    ) -> tuple[int, str]:
        """Run a script to its end: its exit code, and what it said on stderr."""
        process = self.start(*arguments, cwd=cwd, **env)
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors

    def stamps(self) -> list[str]:
        return sorted(path.stem for path in self.project.glob(".venv/shardmill/*.stamp"))

    def pip_calls(self) -> list[str]:
        path = self.notes / "pip"
        return path.read_text().splitlines() if path.exists() else []

    def job(self) -> list[str]:
        """The job's process id, current folder and arguments."""
        return (self.notes / "job").read_text().splitlines()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so; ten seconds at most."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_one_sentence(errors: str, *words: str) -> bool:
    """Is this a single line from us, a whole sentence, with these words in it?"""
    return (
        errors.startswith("shardmill: ")
        and errors.count("\n") == 1
        and errors.endswith(".\n")
        and all(word in errors for word in words)
    )

"""Slurm on this machine: `sbatch`, `scontrol` and `srun` that do what a batch script relies on.

`sbatch` only takes the script; a test starts it as Slurm would. `srun` really starts its tasks,
each in a session of its own, and kills them when it is told to end, as Slurm's does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

SBATCH = """#!/usr/bin/env bash
cat >"{folder}/script"
echo "Submitted batch job 4711"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) for ((n = 0; n < {num_nodes}; n++)); do echo localhost; done ;;
  requeue)
    echo "$2" >>"{folder}/requeued"
    touch "{folder}/ending"
    ;;
esac
"""
SRUN = """#!/usr/bin/env bash
[[ ! -e "{folder}/ending" ]] || exit 1 # a job that is being ended gets no more steps
num_tasks=1 tasks=()
while [[ "$1" == --* ]]; do
  [[ "$1" != --ntasks=* ]] || num_tasks="${{1#*=}}"
  shift
done
trap 'for task in "${{tasks[@]}}"; do kill -KILL -- "-$task"; done' TERM
for ((n = 0; n < num_tasks; n++)); do
  SLURM_PROCID=$n SLURM_CPUS_ON_NODE=1 setsid -- "$@" &
  tasks+=($!)
  echo "$!" >>"{folder}/tasks"
done
wait
wait # the first one ends with the signal
"""


@dataclass
class FakeSlurm:
    """A queue with one job in it.

    Attributes:
        folder: of the programs and of what they note; jobs run in it.
    """

    folder: Path
    num_nodes: int = 1
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bin.mkdir(parents=True)
        for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN)):
            text = text.format(folder=self.folder, num_nodes=self.num_nodes)
            make_program(self.bin / name, text)

    @property
    def bin(self) -> Path:
        """To be put before everything else on PATH."""
        return self.folder / "bin"

    @property
    def path(self) -> str:
        """A PATH on which the programs are found."""
        return f"{self.bin}:{os.environ['PATH']}"

    @property
    def script(self) -> Path:
        """What sbatch was given last."""
        return self.folder / "script"

    @property
    def num_requeued(self) -> int:
        """How often the job was queued again."""
        path = self.folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def options(self) -> dict[str, str]:
        """The script's #SBATCH lines, by option."""
        lines = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", self.script.read_text(), re.M)
        return dict(lines)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """Starts the script as the batch step of job 4711."""
        for note in ("ending", "tasks"):
            (self.folder / note).unlink(missing_ok=True)
        process = subprocess.Popen(
            ["bash", self.script],
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": self.path,
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_NAME": self.options()["job-name"],
                "SLURM_JOB_NODELIST": "node-[1-2]",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # What was ignored when bash started, it cannot trap.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def close(self) -> None:
        """Ends what a failed test has left."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._kill_tasks()

    def _kill_tasks(self) -> None:
        tasks = self.folder / "tasks"
        for task in tasks.read_text().split() if tasks.exists() else ():
            with suppress(ProcessLookupError):
                os.killpg(int(task), signal.SIGKILL)


def make_program(path: Path, text: str) -> Path:
    """A program in a file."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path

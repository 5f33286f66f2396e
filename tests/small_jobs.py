"""Small jobs on disk and the command line to run them with, for tests of whole runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import yaml

RUN_LIMIT = 100.0
"""Seconds that any command of a test may take on a busy machine."""


def write_job(folder: Path, model: Path, table: pa.Table, **blocks: Mapping[str, Any]) -> Path:
    """A job file over one Parquet file with several row groups, both in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "in.parquet", row_group_size=max(1, table.num_rows // 3))
    job: dict[str, Any] = {
        "name": "test",
        "input": {"path": "in.parquet"},
        "prompt": {"template": "{{ q }}"},
        "model": {"path": str(model)},
        "generation": {"max_new_tokens": 12},
        "output": {"path": "out"},
        "workers": {"count": 2},
    }
    for name, settings in blocks.items():
        job[name] = {**job.get(name, {}), **settings}
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return folder / "job.yaml"


def questions(count: int) -> pa.Table:
    """Prompts of different lengths, a number to know them by, and a type that much cannot do."""
    texts = [f"Question: {'If ' * (n % 5)}{n} apples cost {n * 7 % 13}?" for n in range(count)]
    views = pa.array(texts, pa.string_view())
    return pa.table({"q": texts, "n": list(range(count)), "view": views})


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Its standard output, which must be JSON and nothing else."""
        return json.loads(self.stdout)


def shardmill(*arguments: object, **environment: str) -> Result:
    """Runs a command to its end in a process of its own."""
    process = start(*arguments, **environment)
    return finish(process)


def start(
    *arguments: object,
    module: str = "jobs",
    command: Sequence[str] = (sys.executable,),
    **environment: str,
) -> subprocess.Popen[str]:
    """Starts a command.

    Args:
        module: another one than the real, with a fault in it.
        command: the interpreter, with another program around it if need be.
    """
    return subprocess.Popen(
        [*command, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
    )


def start_held(gate: Path, *arguments: object) -> subprocess.Popen[str]:
    """Starts a command whose workers do one shard each and wait then for the file `gate`."""
    return start(*arguments, module="tests.held", SHARDMILL_GATE=str(gate))


def finish(process: subprocess.Popen[str], limit: float = RUN_LIMIT) -> Result:
    """Waits for a command; one that hangs fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    return Result(process.returncode, stdout, stderr)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Waits for a state of the run folder, for as long as the command runs."""
    deadline = time.monotonic() + RUN_LIMIT
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.02)


def num_segments(output: Path) -> int:
    """Committed segments in a run folder."""
    return len(list((output / ".shardmill" / "segments").glob("*.parquet")))


def read_output(output: Path) -> pa.Table:
    """The parts as any reader sees them."""
    return ds.dataset(output, format="parquet").to_table()

"""Memory and time that the driver takes to plan a very large input.

    python -m benchmarks.planning --files 2000 --rows-per-file 50000

The files hold one constant column, so 100 million rows take little disk.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "configs" / "quickstart" / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--rows-per-file", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shardmill-") as scratch:
        job = _write_job(Path(scratch), options.files, options.rows_per_file)
        _measure(DRIVER, job, Path(scratch) / "run")
        _measure(PLAN, job, Path(scratch) / "plan")


DRIVER = """
import sys
from pathlib import Path
from jobs.config import load_job
from jobs.ledger import open_or_create
from jobs.prepare import prepare_job
from jobs.recorder import Recorder
job = load_job(Path(sys.argv[1]), [f"output.path={sys.argv[2]}"])
prepared = prepare_job(job, Path(sys.argv[1]).parent / "staging")
ledger = open_or_create(Path(job.output.path), prepared.manifest())
with Recorder(ledger) as recorder:
    print(f"{ledger.manifest.num_rows:,} rows, {ledger.manifest.num_shards:,} shards:", end=" ")
    assert sum(1 for shard in recorder.shards_left()) == ledger.manifest.num_shards
print("what `run` does before its first shard", end=", ")
"""
"""What a run does between its start and its first shard, but for Ray."""

PLAN = """
import sys
from jobs.cli import main
sys.argv[1:] = ["plan", sys.argv[1], "--output", sys.argv[2]]
main()
"""


def _write_job(scratch: Path, num_files: int, rows_per_file: int) -> Path:
    (scratch / "data").mkdir()
    table = pa.table({"question": pa.array(["What is 1 + 1?"] * rows_per_file).dictionary_encode()})
    first = scratch / "data" / "00000.parquet"
    pq.write_table(table, first, row_group_size=10_000)
    content = first.read_bytes()
    for number in range(1, num_files):
        (scratch / "data" / f"{number:05d}.parquet").write_bytes(content)
    job = {
        "name": "planning",
        "input": {"path": "data"},
        "prompt": {"template": "{{ question }}", "chat_template": True},
        "model": {"path": str(MODEL)},
        "generation": {"max_new_tokens": 8},
        "output": {"path": "out"},
    }
    (scratch / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return scratch / "job.yaml"


def _measure(code: str, job: Path, output: Path) -> None:
    """Runs `code` in a process of its own; prints its time and its peak memory."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(job), str(output)], cwd=ROOT, check=True)
    seconds = time.monotonic() - started
    # Of the largest child so far; the larger one runs last.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{seconds:.1f} s, peak memory {peak:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()

"""Time and memory of all that is no model: planning, handing out, committing, status, verify.

    python -m benchmarks.control_plane --rows-per-file 500 5000 50000 500000

2,000 files each time, so 10^6 to 10^9 rows; they hold one constant column and take little disk.
Driver, recorder, ledger and what they write are the real ones; the workers answer at once (see
`instant_crew.py`). Of large jobs only some shards are done, and most parts are hollow: their
footers are right and their rows are not. Each step is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.instant_crew import QUESTION

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "configs" / "quickstart" / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument(
        "--rows-per-file", type=int, nargs="+", default=[500, 5000, 50_000, 500_000]
    )
    parser.add_argument("--shards", type=int, default=4000, help="to be done of a new job")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--scratch", type=Path, help="a folder on the file system to be measured")
    options = parser.parse_args()
    for num_rows in options.rows_per_file:
        print(f"--- {options.files * num_rows:,} rows", flush=True)
        with tempfile.TemporaryDirectory(prefix="shardmill-", dir=options.scratch) as scratch:
            job = _write_job(Path(scratch), options.files, num_rows)
            _measure_size(job, options.shards, options.workers)


def _measure_size(job: Path, num_shards: int, num_workers: int) -> None:
    run = str(job.parent / "run")
    step = ["benchmarks.control_steps"]
    drive = ["drive", str(job), run, "--workers", str(num_workers), "--shards"]
    _measure("plan", ["jobs", "plan", str(job)])
    _measure("new", [*step, "open", str(job), run])
    _measure("driven", [*step, *drive, str(num_shards)])
    _measure("status", ["jobs", "status", run])
    _measure("verify", ["jobs", "verify", run])
    _measure("hollow", [*step, "fill", str(job), run, "--share", "0.5"])
    _measure("half, continued", [*step, "open", str(job), run])
    _measure("half, driven", [*step, *drive, str(num_shards // 4)])
    _measure("half, status", ["jobs", "status", run])
    _measure("hollow", [*step, "fill", str(job), run, "--share", "1"])
    _measure("all, continued", [*step, "open", str(job), run])
    _measure("all, status", ["jobs", "status", run])
    Path(run, ".shardmill", "parts.jsonl").unlink()
    _measure("all, status without the tally", ["jobs", "status", run])


def _write_job(scratch: Path, num_files: int, rows_per_file: int) -> Path:
    (scratch / "data").mkdir()
    table = pa.table({"question": pa.array([QUESTION] * rows_per_file).dictionary_encode()})
    first = scratch / "data" / "00000.parquet"
    pq.write_table(table, first, row_group_size=10_000)
    for number in range(1, num_files):
        shutil.copyfile(first, first.with_name(f"{number:05d}.parquet"))
    job = {
        "name": "control-plane",
        "input": {"path": "data"},
        "prompt": {"template": "{{ question }}", "chat_template": True},
        "model": {"path": str(MODEL)},
        "generation": {"max_new_tokens": 8},
        "output": {"path": "run"},
    }
    (scratch / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return scratch / "job.yaml"


def _measure(name: str, module: list[str]) -> None:
    """Runs a module in a process of its own; prints its time, its peak memory and what it says."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen([sys.executable, "-m", *module], cwd=ROOT, stdout=output)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        output.seek(0)
        said = output.read().splitlines()
    if child.returncode not in (0, 75):  # what is not complete is verified with 75
        raise SystemExit(f"{name} ended with {child.returncode}: {said[:3]}")
    peak = usage.ru_maxrss / 1024
    cpu = usage.ru_utime + usage.ru_stime
    print(
        f"{name}: {seconds:.1f} s ({cpu:.1f} s of CPU), peak {peak:,.0f} MiB; "
        f"{said[0] if said else 'done'}",
        flush=True,
    )


if __name__ == "__main__":
    main()

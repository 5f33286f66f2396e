"""Kills a run half-way, continues it, and compares with a run that nobody disturbed.

    python -m benchmarks.kill_and_resume --prompts questions.jsonl --column question

Prints wall times and fails if a row is lost, doubled, out of order or different. In float32, since
in bfloat16 another batch around a row rounds differently: a continued run cuts other batches, and
`--dtype bfloat16` shows how many greedy answers that changes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.dataset as ds
import torch
import yaml

from benchmarks.random_model import make_random_llama

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL file")
    parser.add_argument("--column", default="question", help="the prompt's column")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)[options.column] for line in lines]
    with tempfile.TemporaryDirectory(prefix="shardmill-") as scratch:
        job = _write_job(Path(scratch), options, texts)
        undisturbed = _timed("undisturbed", job, Path(scratch) / "undisturbed")
        killed = Path(scratch) / "killed"
        _kill_half_way(job, killed, undisturbed / 2)
        _timed("continued", job, killed)
        _command("verify", killed)
        _compare(killed, Path(scratch) / "undisturbed", len(texts))


def _write_job(scratch: Path, options: argparse.Namespace, texts: list[str]) -> Path:
    dtype = getattr(torch, options.dtype)
    job = {
        "name": "resume",
        "input": {"path": str(options.prompts.resolve())},
        "prompt": {"template": f"Question: {{{{ {options.column} }}}}\nAnswer:"},
        "model": {"path": str(make_random_llama(scratch / "model", texts, dtype))},
        "generation": {"max_new_tokens": options.max_new_tokens},
        "output": {"path": "out"},
        "workers": {"count": 2},
    }
    path = scratch / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def _timed(name: str, job: Path, output: Path) -> float:
    started = time.monotonic()
    _command("run", job, "--output", output, "--quiet")
    seconds = time.monotonic() - started
    print(f"{name}: {seconds:.0f} s")
    return seconds


def _kill_half_way(job: Path, output: Path, seconds: float) -> None:
    process = subprocess.Popen(_arguments("run", job, "--output", output, "--quiet"), cwd=ROOT)
    time.sleep(seconds)
    process.kill()
    process.wait()
    status = subprocess.run(
        _arguments("status", output, "--json"), cwd=ROOT, capture_output=True, check=True, text=True
    )
    facts = json.loads(status.stdout)
    totals = facts["totals"]
    done = totals["stop"] + totals["length"] + totals["error"]
    print(f"SIGKILL after {seconds:.0f} s: {done} of {facts['num_completions']} rows committed")


def _command(*arguments: object) -> None:
    subprocess.run(_arguments(*arguments), cwd=ROOT, check=True)


def _arguments(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "jobs", *map(str, arguments)]


def _compare(killed: Path, undisturbed: Path, num_rows: int) -> None:
    tables = [ds.dataset(folder, format="parquet").to_table() for folder in (killed, undisturbed)]
    rows = [int(row_id.rpartition("#")[2]) for row_id in tables[0]["row_id"].to_pylist()]
    if rows != list(range(num_rows)):
        sys.exit("rows are lost, doubled or out of order")
    columns = ("completion", "finish_reason", "num_completion_tokens")
    differing = sum(
        any(one != other for one, other in zip(pair[0].values(), pair[1].values(), strict=True))
        for pair in zip(*(table.select(columns).to_pylist() for table in tables), strict=True)
    )
    distinct = len(set(tables[0]["completion"].to_pylist()))
    print(f"{num_rows} rows in order, {distinct} distinct completions, {differing} differ")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()

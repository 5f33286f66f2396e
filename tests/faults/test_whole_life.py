"""A job with all that may happen to it: rows that kill, a run that is killed, a retry that is."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.killer import Campaign, prove_complete
from tests.faults.tally import Tally
from tests.small_jobs import questions, read_output, shardmill, write_job

NUM_ROWS = 120
POISON = (17, 18, 101)
"""Rows that kill whoever runs them, two of them side by side."""


def _write(folder: Path, model: Path) -> Path:
    rows = questions(NUM_ROWS).to_pylist()
    for row in POISON:
        rows[row]["q"] = f"DIE {row}"
    engine = {"batch_size": 4}
    job = write_job(folder, model, questions(1), input={"path": "in"}, engine=engine)
    (folder / "in").mkdir()
    for first in range(0, NUM_ROWS, 40):
        table = pa.Table.from_pylist(rows[first : first + 40], questions(1).schema)
        pq.write_table(table, folder / "in" / f"{first:03}.parquet")
    return job


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2))
def test_a_whole_life_costs_no_row(
    tmp_path: Path, scratch: Path, llama_folder: Path, tally: Tally, seed: int
) -> None:
    """Rows that kill cost themselves, through all kills; and a retry that is killed mends them."""
    calm = _write(tmp_path / "calm", llama_folder)
    assert shardmill("run", calm).code == 0
    expected = read_output(calm.parent / "out").to_pylist()
    job = _write(tmp_path / "job", llama_folder)
    output = job.parent / "out"

    # With one kill in a run at most, no row can be alone at two kills that are not its own.
    run = Campaign(["run", str(job)], job.parent, scratch, seed, "tests.poisoned", 1)
    run.run(num_kills=5)
    tally.add(run)
    prove_complete(output)
    rows = read_output(output).to_pylist()
    assert [number for number, row in enumerate(rows) if row["error"]] == list(POISON)
    assert all(rows[number]["error"].startswith("killed: 2 workers") for number in POISON)
    assert all(row == expected[number] for number, row in enumerate(rows) if not row["error"])

    retry = Campaign(["retry", str(output)], tmp_path, scratch, seed, max_worker_kills=1)
    retry.run(num_kills=3)
    tally.add(retry)
    prove_complete(output)
    assert read_output(output).to_pylist() == expected

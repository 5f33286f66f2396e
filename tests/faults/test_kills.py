"""Real runs of the quickstart model whose processes are killed until the job is complete."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from jobs.config import load_job
from jobs.trial import try_job
from tests.faults.killer import DEATH_LIMIT, Campaign, prove_complete
from tests.faults.tally import Tally
from tests.small_jobs import num_segments, read_output, shardmill, wait_until

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
NUM_ROWS = 720

LONG_SEEDS = 36
KILLS_PER_SEED = 7


def _write_job(folder: Path) -> Path:
    """The quickstart job, with so few slots that it lasts for some time."""
    job = yaml.safe_load((QUICKSTART / "job.yaml").read_text(encoding="utf-8"))
    job["input"]["path"] = str(QUICKSTART / "prompts" / "*.parquet")
    job["model"]["path"] = str(QUICKSTART / "model")
    job["output"]["path"] = "out"
    job["engine"] = {"batch_size": 1}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The output of one worker that nobody disturbs."""
    job = _write_job(tmp_path_factory.mktemp("undisturbed"))
    result = shardmill("run", job, "--workers", 1, "--set", "engine.batch_size=32")
    assert result.code == 0, result.stderr
    return read_output(job.parent / "out")


@pytest.mark.timeout(300)
def test_a_run_without_ray_ends_and_is_continued(
    tmp_path: Path, scratch: Path, tally: Tally
) -> None:
    """A worker and then Ray itself are killed: 69 and a sentence at once, and then it completes."""
    job = _write_job(tmp_path)
    campaign = Campaign(["run", str(job), "--limit", "128"], tmp_path, scratch, seed=0)
    process = campaign.start()
    for what in ("worker", "raylet"):
        wait_until(lambda: num_segments(tmp_path / "out") > campaign.kills.total(), process)
        assert campaign.kill(process, what)
    assert process.wait(DEATH_LIMIT) == 69, campaign.last_words()
    assert "Ray's raylet has ended" in campaign.last_words()
    assert "Traceback" not in campaign.last_words()
    campaign.codes.append(69)
    campaign.run(num_kills=0)
    tally.add(campaign)
    prove_complete(tmp_path / "out")
    _check_rows(job, read_output(tmp_path / "out"))


def _check_rows(job: Path, output: pa.Table) -> None:
    """Each row, in order, is what it is when it runs by itself."""
    config = load_job(job, [f"input.limit={output.num_rows}"])
    alone = try_job(config, output.num_rows, lambda text: None)
    for name in ("row_id", "completion", "finish_reason", "num_completion_tokens"):
        assert output[name].to_pylist() == [getattr(row, name) for row in alone]


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(100, 100 + LONG_SEEDS))
def test_many_kills_cost_no_row(
    tmp_path: Path, scratch: Path, undisturbed: pa.Table, tally: Tally, seed: int
) -> None:
    """Seven kills, of anything at any time: complete, and the same answers."""
    job = _write_job(tmp_path)
    campaign = Campaign(["run", str(job)], tmp_path, scratch, seed)
    campaign.run(KILLS_PER_SEED)
    tally.add(campaign)
    prove_complete(tmp_path / "out")
    output = read_output(tmp_path / "out")
    assert output.equals(undisturbed)
    assert output.num_rows == NUM_ROWS

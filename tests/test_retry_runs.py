"""`shardmill retry` as a user meets it: what it refuses, and a real one that is killed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs.cluster import Resources
from jobs.config import load_job
from jobs.ledger import Ledger
from jobs.lock import RunLock
from jobs.progress import Silent
from jobs.retries import read_retries, retry_folder, start_retry
from jobs.retry import RetrySummary, retry_rows
from jobs.run import RunOptions, run_job
from jobs.trial import try_job
from jobs.verify import verify
from pipeline.errors import (
    InputError,
    JobDiffersError,
    JobFileError,
    LockedError,
    ResourceError,
    StoppedError,
)
from pipeline.folder import RunFolder
from pipeline.records import FinishReason
from tests.retried import do_retry, make_finished, make_retry, read
from tests.small_jobs import (
    finish,
    num_segments,
    questions,
    shardmill,
    start_held,
    wait_until,
    write_job,
)

LONGER = "generation.max_new_tokens=13"
LENGTH = (FinishReason.LENGTH,)


@pytest.fixture
def folder(tmp_path: Path, llama_folder: Path) -> Path:
    """A complete run of 40 rows of which one failed and one was cut at 12 tokens."""
    return make_finished(write_job(tmp_path, llama_folder, questions(40)))


def _retry(
    folder: Path,
    only: Sequence[FinishReason] = (),
    *overrides: str,
    options: RunOptions = RunOptions(),  # noqa: B008 - it is frozen
) -> RetrySummary:
    return retry_rows(folder, only, overrides, options, Silent())


def _files(folder: Path) -> dict[Path, bytes]:
    """Everything but the lock and the logs."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock" and path.suffix != ".log"
    }


@pytest.mark.parametrize(
    ("only", "overrides", "error", "words"),
    [
        (LENGTH, (), JobFileError, "more than 12"),
        (LENGTH, ("generation.max_new_tokens=12",), JobFileError, "more than 12"),
        ((), ("generation.max_new_tokens=11",), JobFileError, "less than 12"),
        ((), ("generation.max_new_tokens=128",), JobFileError, "leaves no room"),
        ((), ("generation.max_new_tokens=many",), JobFileError, "generation.max_new_tokens"),
        ((), ("generation.stop=[x]",), JobDiffersError, r'generation.stop: \[\] -> \["x"\]'),
        ((), ("prompt.template={{ n }}",), JobDiffersError, "prompt.template"),
        ((), ("input.limit=5",), JobDiffersError, "input.limit"),
        ((), ("model.path=./nowhere",), Exception, "nowhere"),
    ],
)
def test_what_is_refused(
    folder: Path,
    only: Sequence[FinishReason],
    overrides: tuple[str, ...],
    error: type[Exception],
    words: str,
) -> None:
    """Other settings than the limit, and a limit that changes nothing: a sentence, and no trace."""
    before = _files(folder)
    with pytest.raises(error, match=words):
        _retry(folder, only, *overrides)
    assert _files(folder) == before


def test_an_edited_input_is_refused(folder: Path) -> None:
    """Prompts that were not asked before do not get in among the old answers."""
    pq.write_table(questions(41).slice(1), folder.parent / "in.parquet")
    with pytest.raises(JobDiffersError, match=r"input\.file\.in\.parquet"):
        _retry(folder)


def test_a_run_that_is_not_complete_is_refused(folder: Path) -> None:
    """Its missing rows are `run`'s to do, and the sentence says so."""
    (folder / "_SUCCESS").unlink()
    with pytest.raises(InputError, match="shardmill run"):
        _retry(folder)


def test_no_run_folder_is_refused(tmp_path: Path) -> None:
    """As by every command that takes one; nothing is made there."""
    with pytest.raises(InputError, match="no output folder of Shardmill"):
        _retry(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(folder: Path) -> None:
    """A retry takes the lock that runs take."""
    with RunLock(folder), pytest.raises(LockedError, match="in use"):
        _retry(folder)


def test_a_stop_file_stops_it(folder: Path) -> None:
    """Before anything has begun, as in a run."""
    (folder.parent / "stop").touch()
    with pytest.raises(StoppedError, match="stop file"):
        _retry(folder, options=RunOptions(stop_file=folder.parent / "stop"))


def test_an_unfinished_retry_is_no_other_one(folder: Path) -> None:
    """Other rows or another limit are refused until it is done, or ended with --fresh."""
    start_retry(RunFolder(folder), make_retry(1, FinishReason.LENGTH, max_new_tokens=13))
    for only, overrides in (((FinishReason.ERROR,), ()), ((), ("generation.max_new_tokens=14",))):
        with pytest.raises(JobDiffersError, match=r"--only length and .* 13; .* --fresh"):
            _retry(folder, only, *overrides)
    with pytest.raises(JobFileError, match="more than 12"):
        _retry(folder, LENGTH, options=RunOptions(fresh=True))
    [record] = read_retries(RunFolder(folder))
    assert record.result is None, "what is refused ends nothing"


def test_a_raised_limit_stays_raised(folder: Path) -> None:
    """The rows of one folder are not cut at less than others were before them."""
    do_retry(Ledger.open(folder), make_retry(1, FinishReason.LENGTH, max_new_tokens=20))
    with pytest.raises(JobFileError, match="less than 20"):
        _retry(folder, (), LONGER)
    with pytest.raises(JobFileError, match="more than 20"):
        _retry(folder, LENGTH, "generation.max_new_tokens=20")


def test_fresh_ends_an_unfinished_retry(tmp_path: Path, llama_folder: Path) -> None:
    """It has put in what it has put in, is on record as that, and is no longer gone on with."""
    folder = make_finished(write_job(tmp_path, llama_folder, questions(40)), is_good=True)
    start_retry(RunFolder(folder), make_retry(1, FinishReason.LENGTH, max_new_tokens=13))
    assert _retry(folder, options=RunOptions(fresh=True)).number is None
    [record] = read_retries(RunFolder(folder))
    assert record.result is not None
    assert record.result.totals.num_completions == 0
    assert verify(folder).notes == []


def test_gpus_that_are_not_there_leave_no_retry(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot start is refused, and the next retry may be another one."""
    monkeypatch.setattr("jobs.run.ray_cluster", lambda _: nullcontext(Resources((2,), (0,))))
    with pytest.raises(ResourceError, match=r"workers\.gpus_per_worker"):
        _retry(folder, (), "workers.gpus_per_worker=1")
    assert read_retries(RunFolder(folder)) == []


def test_nothing_to_retry_is_success(tmp_path: Path, llama_folder: Path) -> None:
    """No Ray, no record, exit code 0, and a line that says so."""
    out = make_finished(write_job(tmp_path, llama_folder, questions(40)), is_good=True)
    before = _files(out)
    result = shardmill("retry", out)
    assert result.code == 0, result.stderr
    assert "nothing to retry: no row of" in result.stdout
    assert "finished by error" in result.stdout
    assert _files(out) == before


def test_nothing_to_retry_in_a_copy_without_its_empty_folders(
    tmp_path: Path, llama_folder: Path
) -> None:
    """Object stores, git and the hub keep no empty folders; they are made again."""
    out = make_finished(write_job(tmp_path, llama_folder, questions(40)), is_good=True)
    for name in ("segments", "tmp", "logs", "input"):
        (out / ".shardmill" / name).rmdir()
    assert _retry(out).number is None


def test_a_retry_that_lost_its_folders_goes_on(folder: Path) -> None:
    """It died before its result, and a power cut, or a copy, left out what was empty."""
    base = Ledger.open(folder)
    do_retry(base, make_retry(max_new_tokens=12))
    own = retry_folder(base.folder, 1)
    (own.root / "result.json").unlink()
    for name in ("segments", "tmp", "logs"):
        (own.internal / name).rmdir()
    assert _retry(folder).number == 1
    assert [record.result is not None for record in read_retries(base.folder)] == [True]


@pytest.mark.parametrize("only", ["stop", "error,stop", "", "error;length"])
def test_only_what_can_change_is_retried(folder: Path, only: str) -> None:
    """Wrong usage exits with 2."""
    result = shardmill("retry", folder, "--only", only)
    assert result.code == 2
    assert "neither error nor length" in result.stderr


@pytest.mark.timeout(300)
def test_a_killed_retry_goes_on(
    tmp_path: Path, llama_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that failed for a cause that is gone, and rows that were cut, end as they should have.

    The cause is Python's limit on the digits of a number, which the first run sets too low for
    some prompts. The retry is killed half-way. What comes out is what one run without that cause,
    and with the larger limit, answers to each prompt alone.
    """
    table = questions(400).append_column("power", pa.array([2 * (399 - n) for n in range(400)]))
    template = "{{ q }}{% if (7 ** power) | string %}{% endif %}"
    job = write_job(
        tmp_path,
        llama_folder,
        table,
        prompt={"template": template},
        generation={"max_new_tokens": 6},
        workers={"count": 1},
    )
    out = tmp_path / "out"
    assert shardmill("run", job, "--quiet", PYTHONINTMAXSTRDIGITS="640").code == 0
    before = read(out)
    reasons = before["finish_reason"].to_pylist()
    assert set(reasons) == {"stop", "length", "error"}

    command = ("retry", out, "--only", "error,length", "--set", "generation.max_new_tokens=12")
    process = start_held(tmp_path / "gate", *command)
    wait_until(lambda: num_segments(retry_folder(RunFolder(out), 1).root) >= 1, process)
    process.kill()
    finish(process)
    assert read(out)["n"].equals(before["n"])
    report = verify(out)
    assert report.state == "complete"
    assert ["retry 1 is unfinished" in note for note in report.notes] == [True]
    assert run_job(load_job(job), RunOptions(), Silent()).work.num_new == 0
    assert "retry 1 is unfinished" in caplog.text

    again = shardmill("retry", out, "--json")
    assert again.code == 0, again.stderr
    assert again.json["number"] == 1
    assert (
        sum(reason != "stop" for reason in reasons)
        == again.json["made"]["stop"] + (again.json["made"]["length"])
    )
    after = read(out)
    kept = pc.indices_nonzero(pc.equal(before["finish_reason"], "stop")).to_pylist()
    assert all(after.slice(row, 1).equals(before.slice(row, 1)) for row in kept)
    assert verify(out).state == "complete"
    num_kept = reasons.count("stop")
    assert verify(out).attempts == {1: num_kept, 2: 400 - num_kept}
    config = load_job(job, ["generation.max_new_tokens=12"])
    alone = [asdict(row) for row in try_job(config, 40, lambda _: None)]
    names = list(alone[0].keys() - {"prompt"})
    assert after.slice(0, 40).select(names).to_pylist() == [
        {name: row[name] for name in names} for row in alone
    ]

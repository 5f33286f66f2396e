"""Whole jobs through the command line, with real Ray workers and a small real model."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.killer import processes_of
from tests.small_jobs import (
    finish,
    num_segments,
    questions,
    read_output,
    shardmill,
    start,
    start_held,
    wait_until,
    write_job,
)

pytestmark = pytest.mark.timeout(300)

ONE = {"count": 1}
"""Workers of jobs to which a second one adds nothing but the seconds that it takes to start."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> pa.Table:
    """The output of one worker that nobody disturbs, over `questions(400)`."""
    job = write_job(tmp_path_factory.mktemp("undisturbed"), llama_folder, questions(400))
    result = shardmill("run", job, "--workers", 1)
    assert result.code == 0, result.stderr
    return read_output(job.parent / "out")


def test_a_run_completes_and_proves_itself(
    tmp_path: Path, llama_folder: Path, undisturbed: pa.Table
) -> None:
    """Two workers give what one gives, in input order, and `verify` and `status` say so."""
    job = write_job(tmp_path, llama_folder, questions(400))
    result = shardmill("run", job, "--json")
    assert result.code == 0, result.stderr
    totals = result.json["totals"]
    assert totals["error"] == 0
    metrics = json.loads((tmp_path / "out" / ".shardmill" / "metrics.json").read_text())
    assert metrics["job"]["num_generated_tokens"] == totals["num_completion_tokens"]
    assert metrics["job"]["num_prefilled_tokens"] > 0
    assert 0 < metrics["job"]["slot_occupancy"] <= 1
    for name in ("num_generated_tokens", "num_steps"):
        assert sum(each[name] for each in metrics["workers"]) == metrics["job"][name]
    for each in metrics["workers"]:
        assert each["load_seconds"] > 0
        assert each["peak_host_bytes"] > 50 * 2**20
        assert each["peak_gpu_bytes"] == []
    models = {each["model"].split(",")[0] for each in metrics["workers"] if "model" in each}
    assert models == {"LlamaForCausalLM"}
    checks = [each["self_check"] for each in metrics["workers"] if "model" in each]
    for check in checks:
        assert (check["batches"], check["rejected"]) == ("slots", [])
        assert check["difference"] <= check["tolerance"] == 0.001
    output = read_output(tmp_path / "out")
    assert output.equals(undisturbed)
    assert output["n"].to_pylist() == list(range(400))
    assert len(set(output["completion"].to_pylist())) > 50, "the model must not say one thing"
    assert shardmill("verify", tmp_path / "out").code == 0
    status = shardmill("status", tmp_path / "out", "--json", "--exit-code")
    assert status.code == 0
    assert status.json["is_complete"]


def test_nobody_needs_to_read_along(tmp_path: Path, llama_folder: Path) -> None:
    """A reader of the log that goes away takes neither the run nor its exit code with it."""
    job = write_job(tmp_path, llama_folder, questions(40), workers=ONE)
    process = start("run", job)
    assert process.stderr is not None
    assert process.stdout is not None
    process.stderr.close()
    with process.stdout:
        assert process.stdout.read().startswith("complete: 40 rows")
    assert process.wait(timeout=120) == 0
    assert shardmill("status", tmp_path / "out", "--exit-code").code == 0


def test_a_killed_driver_is_continued(
    tmp_path: Path, llama_folder: Path, undisturbed: pa.Table
) -> None:
    """SIGKILL half-way, the same command again: complete, verified, and the same answers."""
    job = write_job(tmp_path, llama_folder, questions(400), workers=ONE)
    process = start_held(tmp_path / "gate", "run", job)
    wait_until(lambda: num_segments(tmp_path / "out") >= 1, process)
    process.kill()
    finish(process)
    assert shardmill("status", tmp_path / "out", "--exit-code").code == 75
    assert shardmill("verify", tmp_path / "out").code == 75

    again = shardmill("run", job, "--json")
    assert again.code == 0, again.stderr
    assert again.json["work"]["num_new"] < 400, "what was committed is not done again"
    assert shardmill("verify", tmp_path / "out").code == 0
    assert read_output(tmp_path / "out").equals(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_commits_and_exits_with_75(
    tmp_path: Path, llama_folder: Path, number: signal.Signals
) -> None:
    """A signal ends the run in good order, and the next run goes on from there."""
    job = write_job(tmp_path, llama_folder, questions(400), workers=ONE)
    process = start_held(tmp_path / "gate", "run", job)
    wait_until(lambda: num_segments(tmp_path / "out") >= 1, process)
    process.send_signal(number)
    result = finish(process)
    assert result.code == 75, result.stderr
    assert number.name in result.stderr
    assert "Traceback" not in result.stderr
    done = shardmill("status", tmp_path / "out", "--json").json["totals"]
    assert done["stop"] + done["length"] > 0


def test_a_stop_file_stops_before_any_work(tmp_path: Path, llama_folder: Path) -> None:
    """With the stop file there from the beginning, the run commits nothing and exits with 75."""
    job = write_job(tmp_path, llama_folder, questions(40))
    (tmp_path / "stop").touch()
    result = shardmill("run", job, "--stop-file", tmp_path / "stop")
    assert result.code == 75
    assert "stop file" in result.stderr


def test_a_killed_worker_costs_no_row(
    tmp_path: Path, llama_folder: Path, undisturbed: pa.Table
) -> None:
    """SIGKILL of one worker: the other one, and its replacement, do its shards."""
    job = write_job(tmp_path, llama_folder, questions(400))
    process = start_held(tmp_path / "gate", "run", job)
    wait_until(lambda: num_segments(tmp_path / "out") >= 2, process)
    [worker] = processes_of(process.pid)["worker"]
    worker.kill()
    (tmp_path / "gate").touch()
    result = finish(process)
    assert result.code == 0, result.stderr
    assert "was lost" in result.stderr
    assert read_output(tmp_path / "out").equals(undisturbed)


def test_rows_that_kill_or_stall_workers_cost_themselves(
    tmp_path: Path, llama_folder: Path, undisturbed: pa.Table
) -> None:
    """Workers die of one row and stand still at another: all other rows are as ever."""
    prompts = questions(12).to_pylist()
    prompts[0]["q"], prompts[6]["q"] = "DIE", "SLEEP"
    job = write_job(tmp_path, llama_folder, questions(1), input={"path": "in"})
    (tmp_path / "in").mkdir()
    for name, rows in (("a", prompts[:6]), ("b", prompts[6:7]), ("c", prompts[7:])):
        table = pa.Table.from_pylist(rows, questions(1).schema)
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")

    limits = ("--set", "failure.stall_timeout=5", "--set", "failure.max_failed_rows=2")
    process = start("run", job, "--json", *limits, module="tests.poisoned")
    result = finish(process, limit=200)  # seven workers are lost, and seven started again
    assert result.code == 0, result.stderr
    assert result.json["totals"]["error"] == 2, "and Ray has written nothing beside the facts"
    assert shardmill("verify", tmp_path / "out").code == 0
    output = read_output(tmp_path / "out")
    errors = output["error"].to_pylist()
    assert [row for row in range(12) if errors[row]] == [0, 6]
    assert all(error.startswith("killed: 2 workers") for error in (errors[0], errors[6]))
    assert "its process died" in errors[0]
    assert "it stood still for 5 s" in errors[6]
    assert "row a.parquet#0 became an error row" in result.stderr
    expected = undisturbed["completion"].to_pylist()[:12]
    expected[0] = expected[6] = None
    assert output["completion"].to_pylist() == expected


def test_a_changed_job_is_refused_and_fresh_keeps_the_old_output(
    tmp_path: Path, llama_folder: Path
) -> None:
    """Other answers never mix with old ones: 78 with a diff; `--fresh` moves the old ones aside."""
    job = write_job(tmp_path, llama_folder, questions(20), workers=ONE)
    assert shardmill("run", job).code == 0
    before = read_output(tmp_path / "out")

    change = ("--set", "generation.max_new_tokens=5")
    refused = shardmill("run", job, *change)
    assert refused.code == 78
    assert "generation.max_new_tokens: 12 -> 5" in refused.stderr
    assert read_output(tmp_path / "out").equals(before)

    assert shardmill("run", job, *change, "--fresh").code == 0
    [old] = tmp_path.glob("out.old-*")
    assert read_output(old).equals(before)
    assert max(read_output(tmp_path / "out")["num_completion_tokens"].to_pylist()) == 5


def test_bad_rows_cost_themselves(tmp_path: Path, llama_folder: Path) -> None:
    """A null, a prompt that is too long and an empty one become error rows among good ones."""
    prompts = ["fine", None, "long " * 200, "", "fine too", *["more"] * 27]
    table = pa.table({"q": pa.array(prompts, pa.string())})
    # No BOS token is added to a chat, so the empty prompt really is empty.
    job = write_job(tmp_path, llama_folder, table, workers=ONE)
    result = shardmill("run", job, "--set", "failure.max_failed_rows=3")
    assert result.code == 0, result.stderr
    output = read_output(tmp_path / "out")
    kinds = [(error or "").partition(":")[0] for error in output["error"].to_pylist()]
    assert kinds[:5] == ["", "null_column", "overlong", "empty_prompt", ""]
    assert not any(kinds[5:])
    assert shardmill("verify", tmp_path / "out").code == 0


def test_too_many_bad_rows_exit_with_65(tmp_path: Path, llama_folder: Path) -> None:
    """Past the failure budget the exit code says so and what is good is kept."""
    table = pa.table({"q": pa.array([None] * 10 + ["fine"] * 30, pa.string())})
    job = write_job(tmp_path, llama_folder, table, workers=ONE)
    result = shardmill("run", job)
    assert result.code == 65
    assert "failure.max_failed_rows" in result.stderr
    assert re.search(r"One of them, in\.parquet#\d: null_column: column 'q'", result.stderr)
    assert shardmill("run", job).code == 65, "the same command ends the same way"
    assert shardmill("status", tmp_path / "out", "--exit-code").code == 65
    raised = shardmill("run", job, "--set", "failure.max_failed_rows=0.5")
    assert raised.code == 0, raised.stderr


def test_samples_do_not_depend_on_workers_or_batches(tmp_path: Path, llama_folder: Path) -> None:
    """The same seed gives the same samples, with other workers and another batch size."""
    outputs = []
    for name, changes in {
        "a": ("--workers", 2, "--set", "engine.batch_size=4"),
        "b": ("--workers", 1, "--set", "engine.batch_size=32"),
    }.items():
        job = write_job(
            tmp_path / name,
            llama_folder,
            questions(40),
            generation={"temperature": 1.0, "num_samples": 3, "max_new_tokens": 8},
        )
        assert shardmill("run", job, *changes).code == 0
        outputs.append(read_output(tmp_path / name / "out"))
    assert outputs[0].equals(outputs[1])
    assert outputs[0]["sample_index"].to_pylist() == [0, 1, 2] * 40
    first, second = outputs[0]["completion"].to_pylist()[:2]
    assert first != second


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    """Exit code 69, one sentence, and no folder is left behind."""
    job = write_job(tmp_path, llama_folder, questions(4), workers={"gpus_per_worker": 1})
    result = shardmill("run", job, CUDA_VISIBLE_DEVICES="")
    assert result.code == 69
    assert "workers.gpus_per_worker" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_second_driver_is_turned_away(tmp_path: Path, llama_folder: Path) -> None:
    """Two drivers never work in one folder: the second exits with 75 at once."""
    job = write_job(tmp_path, llama_folder, questions(400), workers=ONE)
    process = start_held(tmp_path / "gate", "run", job)
    wait_until(lambda: num_segments(tmp_path / "out") >= 1, process)
    second = shardmill("run", job)
    assert second.code == 75
    assert "in use by another run" in second.stderr
    (tmp_path / "gate").touch()
    assert finish(process).code == 0


def test_a_signal_before_the_workers_start_stops_too(tmp_path: Path, llama_folder: Path) -> None:
    """Whenever it comes, a first stop signal exits with 75, and no half-made folder is left."""
    job = write_job(tmp_path, llama_folder, questions(40), workers=ONE)
    process = start("run", job)
    wait_until(lambda: (tmp_path / "out" / ".shardmill" / "logs" / "run.log").exists(), process)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.code == 75, result.stderr
    assert "SIGTERM" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_removes_nothing_of_others(tmp_path: Path, llama_folder: Path) -> None:
    """The folder above was made by the run that fails; by then it holds another one's output."""
    job = write_job(tmp_path, llama_folder, questions(4), output={"path": "runs/a"})
    (tmp_path / "in.jsonl").write_text('{"q": "x"}\n' * 300_000 + '{"q": \n', encoding="utf-8")
    process = start("run", job, "--set", "input.path=" + str(tmp_path / "in.jsonl"))
    wait_until((tmp_path / "runs" / "a").exists, process)
    (tmp_path / "runs" / "b").mkdir()
    (tmp_path / "runs" / "b" / "notes.txt").write_text("mine", encoding="utf-8")
    result = finish(process)
    assert result.code == 65, result.stderr
    assert (tmp_path / "runs" / "b" / "notes.txt").exists()
    assert not (tmp_path / "runs" / "a").exists()


def test_an_edited_input_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    """One letter in one row, same size, and the old answers are not mixed with new ones."""
    job = write_job(tmp_path, llama_folder, questions(40), workers=ONE)
    table = questions(40)
    pq.write_table(table, tmp_path / "in.parquet", compression="none", use_dictionary=False)
    assert shardmill("run", job).code == 0
    content = (tmp_path / "in.parquet").read_bytes()
    (tmp_path / "in.parquet").write_bytes(content.replace(b"11 apples", b"11 applez"))
    refused = shardmill("run", job)
    assert refused.code == 78, refused.stderr
    assert "input.file.in.parquet" in refused.stderr

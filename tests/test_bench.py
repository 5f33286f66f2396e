"""`shardmill bench`: real figures of real models, and cells for what goes wrong."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import TypeAdapter

from jobs import bench
from jobs.bench import BenchReport, Grid, Kind, bench_model
from jobs.bench_pages import bench_page
from jobs.cli import main
from jobs.config import JobConfig, load_job
from jobs.html import page_html
from jobs.page import page_text
from pipeline.errors import ModelError, ResourceError
from pipeline.measured import Cell, Shape, State
from tests import bench_faults
from tests.bench_faults import HANGING, KILLED, MEMORY, RAISING, SLOW, use_faults
from tests.small_jobs import Result, finish, start, wait_until

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"
MODEL = QUICKSTART / "model"
JOB = QUICKSTART / "job.yaml"


TWO_GIB = ("sh", "-c", f'ulimit -d {2 * 2**20} && exec "$0" "$@"')
"""Runs what follows with no more memory than that."""


@pytest.fixture(scope="module")
def report() -> BenchReport:
    """The quickstart model through the command, its attention another than a job's."""
    process = start(
        *("bench", MODEL, "--attention", "eager", "--batch", "8192,4,1"),
        *("--context", "64,32,512", "--seconds", "60", "--json", "--quiet"),
        command=(*TWO_GIB, sys.executable),
        OMP_NUM_THREADS="1",
    )
    done = finish(process)
    assert done.code == 0, done.stderr
    assert "context" not in done.stderr  # what goes on is not told
    return TypeAdapter(BenchReport).validate_python(done.json)


def test_every_cell_that_fits_has_figures(report: BenchReport) -> None:
    """By context and batch; what the model has no context for is left out."""
    assert report.batches == (1, 4, 8192)
    assert report.contexts == (32, 64)
    assert report.left_out == (512,)
    (kind,) = report.kinds
    assert kind.name == "none, eager"
    assert [cell.shape for cell in kind.cells] == [
        Shape(batch, context) for context in (32, 64) for batch in (1, 4, 8192)
    ]
    for cell in small(kind):
        assert cell.state is State.MEASURED
        assert cell.speed is not None
        assert cell.speed.prefill_tokens_per_second > 0
        assert cell.speed.step_seconds > 0
        step = cell.shape.batch / cell.speed.decode_tokens_per_second
        assert step == pytest.approx(cell.speed.step_seconds)


def small(kind: Kind) -> list[Cell]:
    """The cells that fit into memory."""
    return [cell for cell in kind.cells if cell.shape.batch < 8192]


def test_memory_that_ends_is_a_cell(report: BenchReport) -> None:
    """A real want of it: the process lives on, and nothing larger is tried."""
    (kind,) = report.kinds
    ended = {shape: state for shape, state in states(kind.cells).items() if shape[0] == 8192}
    assert ended == {(8192, 32): "memory", (8192, 64): "untried"}


def test_memory_is_that_of_the_model_and_its_process(report: BenchReport) -> None:
    """Weights to the byte, or little more for buffers; what the process takes is plausible."""
    (kind,) = report.kinds
    assert kind.facts is not None
    assert 902_272 * 4 <= kind.facts.num_weight_bytes < 902_272 * 4.2
    for cell in small(kind):
        assert cell.speed is not None
        assert 2**26 < cell.speed.peak_bytes < 2**31


def test_the_page_says_where_and_how(report: BenchReport) -> None:
    """Machine, versions, date and type beside the figures, in text and in HTML."""
    page = bench_page(report)
    html = page_html(page, "<svg></svg>")
    for text in (page_text(page), html):
        for word in ("torch 2.", "transformers 5.", "float32", "UTC", "LlamaForCausalLM", "eager"):
            assert word in text
        assert "context is shorter: 512" in text
    assert "<svg></svg>" in html


def test_the_plot_has_a_line_for_each_kind(report: BenchReport) -> None:
    """One SVG element, with the names of the kinds, and a panel for each context and figure."""
    pytest.importorskip("matplotlib")
    from jobs.plot import plot_svg

    two = (report.kinds[0], replace(report.kinds[0], quantization="nf4"))
    svg = plot_svg(replace(report, kinds=two))
    assert svg.startswith("<svg")
    assert svg.count('id="axes_') == 2 * 3
    for words in ("none, eager", "nf4, eager", "context 64", "decode, tokens/s"):
        assert f"<!-- {words} -->" in svg


@pytest.fixture
def quickstart() -> JobConfig:
    """The quickstart job, of which the model counts."""
    return load_job(JOB)


def grid(*batches: int, **changes: Any) -> Grid:
    """One kind over the contexts 32 and 64."""
    values = {"quantizations": (None,), "attentions": (None,), "contexts": (32, 64)}
    return Grid(**{**values, "batches": batches, "max_seconds": 1.0, **changes})


def states(cells: tuple[Cell, ...]) -> dict[tuple[int, int], str]:
    """By batch and context."""
    return {(cell.shape.batch, cell.shape.context): cell.state.value for cell in cells}


@pytest.mark.parametrize(
    ("batch", "state"), [(KILLED, "killed"), (MEMORY, "memory"), (RAISING, "failed")]
)
def test_what_fails_is_a_cell_and_stops_the_growth(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    quickstart: JobConfig,
    batch: int,
    state: str,
) -> None:
    """A killed process, want of memory, a bug: smaller cells are measured, larger not tried."""
    use_faults(monkeypatch)
    monkeypatch.setenv(bench_faults.TRIED, str(tmp_path / "tried"))
    report = bench_model(quickstart, grid(1, batch, batch + 100))
    assert states(report.kinds[0].cells) == {
        (1, 32): "measured",
        (batch, 32): state,
        (batch + 100, 32): "untried",
        (1, 64): "measured",
        (batch, 64): "untried",
        (batch + 100, 64): "untried",
    }
    tried = [line.split() for line in (tmp_path / "tried").read_text().splitlines()]
    assert [shape for _, *shape in tried] == [["1", "32"], [str(batch), "32"], ["1", "64"]]
    # Another process goes on where one has died.
    assert len({pid for pid, *_ in tried}) == (1 if state == "memory" else 2)
    text = page_text(bench_page(report))
    assert state in text
    assert "-: not tried" in text


def test_a_slow_cell_keeps_its_figures_and_stops_the_growth(
    monkeypatch: pytest.MonkeyPatch, quickstart: JobConfig
) -> None:
    """What took longer than it should tells enough."""
    use_faults(monkeypatch)
    report = bench_model(quickstart, grid(1, SLOW, 200))
    assert states(report.kinds[0].cells) == {
        (1, 32): "measured",
        (SLOW, 32): "measured",
        (200, 32): "untried",
        (1, 64): "measured",
        (SLOW, 64): "untried",
        (200, 64): "untried",
    }


def test_a_cell_that_does_not_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, quickstart: JobConfig
) -> None:
    """Every wait has a limit, and the process that hangs is gone afterwards."""
    use_faults(monkeypatch)
    monkeypatch.setattr(bench, "CELL_SECONDS", 0.5)
    report = bench_model(quickstart, grid(1, HANGING, contexts=(32,)))
    assert states(report.kinds[0].cells) == {(1, 32): "measured", (HANGING, 32): "slow"}
    assert not psutil.Process().children()


def test_a_kind_that_cannot_be_loaded_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, quickstart: JobConfig
) -> None:
    """It has its word in every cell and its sentence below; alone it ends the command."""
    use_faults(monkeypatch)
    report = bench_model(quickstart, grid(1, quantizations=("int8", "none", "fp4")))
    cells = [set(states(kind.cells).values()) for kind in report.kinds]
    assert cells == [{"failed"}, {"measured"}, {"killed"}]
    assert "int8 is not for this model" in page_text(bench_page(report))
    with pytest.raises(ModelError, match="int8 is not for this model"):
        bench_model(quickstart, grid(1, quantizations=("int8",)))
    with pytest.raises(ResourceError, match="killed by signal 9"):
        bench_model(quickstart, grid(1, quantizations=("fp4",)))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_process_is_left_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C ends the one that measures, and so does our own death."""
    tried = tmp_path / "tried"
    process = start(
        *("bench", MODEL, "--batch", HANGING, "--context", "32"),
        module="tests.bench_faults",
        **{bench_faults.TRIED: str(tried)},
    )
    wait_until(lambda: tried.exists() and "\n" in tried.read_text(), process)
    child = psutil.Process(int(tried.read_text().split()[0]))
    process.send_signal(number)
    done = finish(process)
    assert done.code == code
    assert "Traceback" not in done.stderr
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def shardmill(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs a command in this process; no process is to be started."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr("sys.argv", ["shardmill", *map(str, arguments)])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        monkeypatch.setattr("jobs.bench.Isolated", None)
        monkeypatch.setattr("jobs.compare.Isolated", None)
        with pytest.raises(SystemExit) as raised:
            main()
        out, err = capsys.readouterr()
        return Result(int(raised.value.code or 0), out, err)

    return call


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--quantization", "int3", MODEL], 2, "'int3' is none of none, int8"),
        (["--quantization", "nf4,nf4", MODEL], 2, "'nf4' stands there twice"),
        (["--batch", "1,,8", MODEL], 2, "'' is no whole number from 1 on"),
        (["--batch", "8,65537", MODEL], 2, "'65537' is more than 65,536, the most there can be"),
        (["--context", "16", MODEL], 2, "'16' is no whole number from 32 on"),
        (["--attention", "fast", MODEL], 2, "'fast' is none of sdpa"),
        (["--output", "nowhere/x.html", MODEL], 2, "there is no folder"),
        (["--compare", "none", MODEL], 2, "give it a job file"),
        (["--compare", "none,int3", JOB], 2, "'int3' is none of"),
        (["--compare", "none", "--batch", "8", JOB], 2, "--batch goes without --compare"),
        (["-n", "8", MODEL], 2, "-n goes with --compare only"),
        (["--compare", "none", "--expected", "answer", JOB], 78, "names 'answer'"),
        (["--compare", "none", "nowhere.yaml"], 78, "nowhere.yaml"),
        (["./nowhere"], 65, "nowhere"),
        (["--set", "model.dtype=int7", MODEL], 78, "'model.dtype'"),
        (["--context", "512,1024", MODEL], 65, "context of 256 tokens"),
    ],
)
def test_bad_input_gets_a_sentence(
    shardmill: Callable[..., Result], arguments: list[object], code: int, words: str
) -> None:
    """What was wrong and what to do, and the exit code that fits, before anything starts."""
    result = shardmill("bench", *arguments)
    assert result.code == code, result.stderr
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["--quantization", "nf4"], ["--compare", "none,nf4"]])
def test_what_is_stored_quantized_is_not_quantized_again(
    shardmill: Callable[..., Result], tmp_path: Path, arguments: list[str]
) -> None:
    """Refused as `run` refuses it."""
    model = tmp_path / "model"
    model.mkdir()
    for file in MODEL.iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((MODEL / "config.json").read_text())
    (model / "config.json").unlink()
    stored = {**config, "quantization_config": {"quant_method": "bitsandbytes"}}
    (model / "config.json").write_text(json.dumps(stored))
    result = shardmill("bench", JOB, "--set", f"model.path={model}", *arguments)
    assert result.code == 65
    assert "quantized already (bitsandbytes)" in result.stderr


def test_a_plot_needs_its_package(
    shardmill: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Said at once, with the command that installs it."""
    monkeypatch.setattr("pipeline.extras.find_spec", lambda name: None)
    result = shardmill("bench", MODEL, "--output", tmp_path / "x.html")
    assert result.code == 65
    assert "pip install 'shardmill[bench]'" in result.stderr


def test_a_worker_of_a_bench_sees_the_gpus_of_one_worker(
    monkeypatch: pytest.MonkeyPatch, quickstart: JobConfig
) -> None:
    """As many as a job's, and the first of those we may use."""
    from jobs.config import WorkersSettings
    from jobs.variants import device_environment

    shown = "CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv(shown, raising=False)
    assert device_environment(WorkersSettings()) == {shown: "0"}
    assert device_environment(WorkersSettings(gpus_per_worker=2)) == {shown: "0,1"}
    monkeypatch.setenv(shown, "5,7")
    assert device_environment(WorkersSettings()) == {shown: "5"}
    assert device_environment(WorkersSettings(gpus_per_worker=0)) == {shown: ""}

"""`shardmill bench --compare`: what quantizations do to a job's own rows."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from jobs.bench_pages import compare_page
from jobs.compare import CompareReport, compare_job
from jobs.config import load_job
from jobs.page import page_text
from pipeline.agreement import Agreement, Score, agreement, score
from pipeline.bench_specs import SampleSpec
from pipeline.errors import ModelError
from pipeline.measured import Answer, Sampled, State
from pipeline.model import Model
from pipeline.records import Sampling, Shard
from pipeline.sampled import run_sample
from pipeline.settings import EngineSettings, ModelSettings, PromptSettings
from tests.bench_faults import use_faults
from tests.small_jobs import shardmill

JOB = Path(__file__).parents[1] / "configs" / "quickstart" / "job.yaml"
NUM_ROWS = 24


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareReport, str]:
    """The quickstart job through its model as it is, again, and as nf4; and the page of it."""
    page = tmp_path_factory.mktemp("compared") / "page.html"
    done = shardmill(
        *("bench", JOB, "--compare", "none,none,nf4", "-n", NUM_ROWS, "--quiet", "--json"),
        *("--output", page),
        OMP_NUM_THREADS="1",
    )
    assert done.code == 0, done.stderr
    return TypeAdapter(CompareReport).validate_python(done.json), page.read_text(encoding="utf-8")


def test_a_model_agrees_with_itself(compared: tuple[CompareReport, str]) -> None:
    """Another process and the same weights: every answer is the same."""
    report, _ = compared
    again = report.variants[1]
    assert again.label == "none (2)"
    assert again.agreement == Agreement(NUM_ROWS, NUM_ROWS, None, None)


def test_what_quantization_changes_is_counted(compared: tuple[CompareReport, str]) -> None:
    """No more than all rows agree; nf4 takes less memory; the score is of column `expected`."""
    report, _ = compared
    plain, _, nf4 = report.variants
    assert (report.num_rows, report.num_input_rows) == (NUM_ROWS, 720)
    assert report.expected == "expected"
    assert plain.agreement is None
    assert plain.score is not None
    assert plain.score in (Score(NUM_ROWS, NUM_ROWS, 0, 0), Score(NUM_ROWS, NUM_ROWS - 1, 0, 0))
    assert nf4.agreement is not None
    assert nf4.agreement.num_compared == NUM_ROWS
    assert NUM_ROWS // 2 < nf4.agreement.num_same <= NUM_ROWS
    assert len(report.examples) == min(3, NUM_ROWS - nf4.agreement.num_same)
    assert nf4.facts is not None
    assert plain.facts is not None
    assert nf4.facts.num_weight_bytes < plain.facts.num_weight_bytes / 3
    for variant in report.variants:
        assert variant.state is State.MEASURED
        assert variant.num_failed == 0
        assert variant.tokens_per_second > 0
        assert variant.decode_tokens_per_second is not None
        assert variant.decode_tokens_per_second > variant.tokens_per_second
        assert variant.num_completion_tokens > NUM_ROWS


def test_the_page_has_the_figures(compared: tuple[CompareReport, str]) -> None:
    """In text, and in one HTML file that needs no other."""
    report, html = compared
    text = page_text(compare_page(report))
    for words in ("24 of 720", "none (2)", "nf4", "100.0%", "weights, MiB", "One row is 4.2%"):
        assert words in text
        assert words in html
    assert html.startswith("<!doctype html>")
    assert "src=" not in html
    assert "href=" not in html


def test_a_quantization_that_dies_is_a_column(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The others have their figures, and rows on which they differ; the reference is needed."""
    use_faults(monkeypatch)
    job = load_job(JOB)
    report = compare_job(job, ["none", "int8", "fp4", "nf4"], 5, "question")
    states = [variant.state.value for variant in report.variants]
    assert states == ["measured", "failed", "killed", "measured"]
    assert report.variants[3].agreement == Agreement(5, 0, first_difference=2, share_before=0.5)
    assert report.variants[3].score == Score(5, 0, 0, 0)
    assert [example.completions for example in report.examples] == [{"none": "aa", "nf4": "ab"}] * 3
    assert report.examples[0].expected is not None
    assert report.examples[0].expected.endswith(("?", "."))
    text = page_text(compare_page(report))
    assert "int8: int8 is not for this model" in text
    assert "fp4: was killed by signal 9" in text
    with pytest.raises(ModelError, match="int8 is not for this model"):
        compare_job(job, ["int8", "none"], 1, None)


def answers(*texts: str | None) -> list[Answer]:
    """A token for each letter; None is a row that failed."""
    return [
        Answer(f"f#{n}", "p", text, tuple(map(ord, text or "")), None if text else "nan: no")
        for n, text in enumerate(texts)
    ]


def test_agreement_is_of_the_rows_that_both_have_answered() -> None:
    """The first other token is counted from 1; one that ends early differs where it ends."""
    right = answers("abcd", "abcd", "abcd", None, "abcd")
    found = agreement(right, answers("abcd", "abXd", "a", "abcd", None))
    assert found == Agreement(3, 1, first_difference=2.5, share_before=0.375)
    assert found.share == pytest.approx(1 / 3)
    assert agreement(right, right) == Agreement(4, 4, None, None)
    assert agreement(answers(None), answers(None)).share is None


def test_a_score_leaves_spaces_out_and_counts_failures() -> None:
    """Rows that expect nothing are not scored."""
    right = answers(" 1", "2", "3", "4", "5")
    expected = {"f#0": "1 ", "f#1": "2", "f#2": "0", "f#3": "4"}
    found = score(right, answers("1", None, "0", "four", "5"), expected)
    assert found == Score(num_scored=4, num_right=2, num_lost=2, num_gained=1)
    assert score(right, right, expected) == Score(4, 3, 0, 0)


def sample(model: Model, table: pa.Table, folder: Path, **sampling: Any) -> Sampled:
    """The rows of a table through the model."""
    path = folder / "in.parquet"
    pq.write_table(table, path)
    spec = SampleSpec(
        model=ModelSettings(path="unused"),
        prompt=PromptSettings(template="{{ q }}"),
        engine=EngineSettings(batch_size=4),
        sampling=Sampling(**{"max_new_tokens": 8, **sampling}),
        seed=3,
        rows=tuple(Shard(n, str(path), "in", n, 1) for n in range(table.num_rows)),
        started=datetime.now(UTC),
    )
    return run_sample(model, spec, lambda num_done: None)


def test_every_row_has_its_answer_or_its_error(llama: Model, tmp_path: Path) -> None:
    """In order; equal prompts, which are generated once, have the same tokens."""
    texts = ["a", None, "The quick", "a", "dog " * 200, "x y"]
    done = sample(llama, pa.table({"q": texts}), tmp_path)
    assert [answer.row_id for answer in done.answers] == [f"in#{n}" for n in range(6)]
    kinds = [(answer.error or "").partition(":")[0] for answer in done.answers]
    assert kinds == ["", "null_column", "", "", "overlong", ""]
    first, again = done.answers[0], done.answers[3]
    assert first.ids
    assert (again.ids, again.text) == (first.ids, first.text)
    for answer in done.answers:
        if answer.text is not None:
            ends = answer.ids and answer.ids[-1] in llama.eos_ids
            assert llama.vocabulary.decode(answer.ids[:-1] if ends else answer.ids) == answer.text
    assert done.num_completion_tokens == sum(len(answer.ids) for answer in done.answers)


def test_samples_have_tokens_of_their_own(llama: Model, tmp_path: Path) -> None:
    """Rows with one prompt and another chance are not taken for one another; and it repeats."""
    table = pa.table({"q": ["a", "a", "a"]})
    one, again = (sample(llama, table, tmp_path, temperature=2.0) for _ in range(2))
    assert len({answer.ids for answer in one.answers}) > 1
    assert one.answers == again.answers
    for answer in one.answers:
        ends = answer.ids[-1] in llama.eos_ids
        assert llama.vocabulary.decode(answer.ids[:-1] if ends else answer.ids) == answer.text

"""Job files: what is taken, and the sentence for what is not."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from jobs.config import FailureSettings, job_schema, load_job
from pipeline.errors import JobFileError

MINIMAL = """
name: solve
input: {path: data/*.parquet}
prompt: {template: "{{ q }}"}
model: {path: model}
output: {path: out}
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A valid job file beside a model folder."""
    (tmp_path / "model").mkdir()
    path = tmp_path / "job.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def _error_of(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(JobFileError) as raised:
        load_job(path)
    return str(raised.value)


def test_defaults_are_filled_in(job_file: Path) -> None:
    """A short job file is a whole job."""
    job = load_job(job_file)
    assert job.generation.max_new_tokens == 256
    assert job.workers.count == "auto"


def test_paths_are_relative_to_the_job_file(job_file: Path) -> None:
    """It does not matter where a job is started from."""
    job = load_job(job_file)
    assert job.input.path == str(job_file.parent / "data/*.parquet")
    assert job.output.path == str(job_file.parent / "out")
    assert job.model.path == str(job_file.parent / "model")


def test_a_hub_id_stays_one(job_file: Path) -> None:
    """`org/name` is no path unless there is such a folder."""
    assert load_job(job_file, ["model.path=org/name"]).model.path == "org/name"


def test_paths_on_the_command_line_are_relative_to_the_current_folder(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with every other command."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    job = load_job(job_file, ["output.path=there", "input.path=[a.parquet, b.parquet]"])
    assert job.output.path == str(tmp_path / "here" / "there")
    assert job.input.path == tuple(
        str(tmp_path / "here" / name) for name in ("a.parquet", "b.parquet")
    )


def test_overrides_are_typed_and_the_last_one_wins(job_file: Path) -> None:
    """`--set` takes YAML values, makes missing blocks, and is checked like the file."""
    job = load_job(
        job_file,
        [
            "generation.temperature=0.5",
            "generation.temperature=1",
            "generation.stop=['\\n', x]",
            "workers={count: 3}",
            "name=other",
        ],
    )
    assert job.generation.temperature == 1.0
    assert job.generation.stop == ("\\n", "x")
    assert (job.workers.count, job.name) == (3, "other")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("prompt.template={{ q }}: {% if a %}b{% endif %}", "{{ q }}: {% if a %}b{% endif %}"),
        ("prompt.template='{{ q }}'", "{{ q }}"),
        ("prompt.template=12", "12"),
        ("prompt.template=*", "*"),
    ],
)
def test_texts_need_no_second_quotes(job_file: Path, override: str, value: str) -> None:
    """What a shell has quoted once is taken as it is, though YAML would read it otherwise."""
    assert load_job(job_file, [override]).prompt.template == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("generation.max_new_tokens=many", "'generation.max_new_tokens' must be a valid integer"),
        ("generation.max_new_tokens", "must look like block.setting=value"),
        ("generation.max_token=1", "did you mean 'generation.max_new_tokens'?"),
        ("name.first=x", "'name' is no block of settings"),
        ("generation.stop=[", "'generation.stop' must be a list, got '['"),
    ],
)
def test_wrong_overrides_are_refused(job_file: Path, override: str, words: str) -> None:
    """A mistyped `--set` never runs as something else."""
    with pytest.raises(JobFileError) as raised:
        load_job(job_file, [override])
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("addition", "words"),
    [
        ("generation: {max_tokens: 5}", "did you mean 'generation.max_new_tokens'?"),
        ("temperature: 1", "did you mean 'generation.temperature'?"),
        ("zzz: 1", "no setting 'zzz'; known there: name, input"),
        (r'"\r.": 1', r"no setting '\r.'; known there: name, input"),
        ("name: again", "line 7: the key 'name' stands there twice"),
        ("generation: {seed: 1, seed: 2}", "the key 'seed' stands there twice"),
        ("generation: 5", "'generation' must be a block of settings, got 5"),
        ("generation: {temperature: warm}", "'generation.temperature' must be a valid number"),
        ("generation: {temperature: -1}", "greater than or equal to 0, got -1"),
        ("generation: {max_new_tokens: true}", "must be a valid integer, got True"),
        ("generation: {stop: ['']}", "'generation.stop[0]' must have at least 1 character"),
        ("workers: {count: some}", "'workers.count' must be a valid integer or 'auto'"),
        ("engine: {kind: fast}", "'engine.kind' must be 'auto'"),
    ],
)
def test_wrong_settings_get_a_sentence(job_file: Path, addition: str, words: str) -> None:
    """Each names the setting, what it must be and what it is."""
    message = _error_of(job_file, MINIMAL + addition)
    assert words in message
    assert message.count("\n") == 0


def test_every_mistake_gets_its_own_line(job_file: Path) -> None:
    """Three mistakes are mended in one go."""
    text = MINIMAL.replace("name: solve", "name: '?'") + "generation: {seed: x, top_kk: 1}"
    assert len(_error_of(job_file, text).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a job file is a YAML mapping"),
        ("- 1", "a job file is a YAML mapping"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("name: x", "'input' is missing"),
    ],
)
def test_files_that_are_no_job_are_refused(job_file: Path, text: str, words: str) -> None:
    """Whatever YAML holds, and whatever it would like to run."""
    assert words in _error_of(job_file, text)


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    """Not a traceback."""
    with pytest.raises(JobFileError, match=r"nowhere\.yaml"):
        load_job(tmp_path / "nowhere.yaml")


def test_prompts_need_one_source(job_file: Path) -> None:
    """A rule over two settings is told like any other."""
    message = _error_of(job_file, MINIMAL.replace('template: "{{ q }}"', "chat_template: true"))
    assert "'prompt' needs exactly one of 'template' and 'messages'" in message


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [(0, 0), (5, 5), (1, 1), (0.1, 11), (0.0, 0), (0.5, 51), (1.0, 101)],
)
def test_the_failure_budget_is_a_count_or_a_share(limit: float, allowed: int) -> None:
    """A whole number counts rows, a fraction is of all rows and rounded up."""
    assert FailureSettings(max_failed_rows=limit).allowed(101) == allowed


def test_the_schema_takes_what_load_takes(job_file: Path) -> None:
    """An editor with the schema agrees with the loader on right and wrong."""
    validator = jsonschema.Draft202012Validator(job_schema())
    job = yaml.safe_load(MINIMAL)
    assert validator.is_valid(job)
    assert not validator.is_valid({**job, "modle": {}})
    assert not validator.is_valid({**job, "generation": {"seed": "x"}})


def test_every_setting_is_described() -> None:
    """The schema is the reference that editors show."""
    definitions = job_schema()["$defs"]
    lacking = [
        f"{block}.{name}"
        for block, definition in definitions.items()
        for name, setting in definition.get("properties", {}).items()
        if "description" not in setting
    ]
    assert not lacking

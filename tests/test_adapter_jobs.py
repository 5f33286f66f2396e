"""LoRA adapters in whole jobs: chosen by a column, and part of what makes two jobs the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from jobs.config import load_job
from jobs.prepare import prepare_job
from pipeline.errors import JobFileError
from tests.lora import make_two_loras
from tests.models import make_llama
from tests.small_jobs import read_output, shardmill, write_job

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_ch:FutureWarning")  # peft's


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 256 positions."""
    folder = tmp_path_factory.mktemp("base") / "model"
    return make_llama(folder, max_position_embeddings=256, hidden_size=64)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two adapters of it."""
    return make_two_loras(base, tmp_path_factory.mktemp("adapters"))


def test_a_whole_job_of_several_adapters(
    base: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    """Rows choose by a column, null and empty are the model itself, an unknown name is an error."""
    names = ["one", "a.b c", None, "", "none such", "one"] * 2
    table = pa.table({"q": ["Question: If"] * 12, "which": names})
    model = {"adapter": {"column": "which", "paths": adapters}}
    job = write_job(tmp_path, base, table, workers={"count": 1})
    _edit(job, model=model, failure={"max_failed_rows": 2})
    done = shardmill("run", job)
    assert done.code == 0, done.stderr
    output = read_output(tmp_path / "out").to_pylist()
    texts = {row["which"]: row["completion"] for row in output}
    assert all(texts[row["which"]] == row["completion"] for row in output)
    assert len({texts["one"], texts["a.b c"], texts[None]}) == 3
    assert texts[""] == texts[None]
    errors = [row["error"] for row in output if row["which"] == "none such"]
    assert errors == ["adapter: column 'which' has 'none such'; there are 'one', 'a.b c'"] * 2


def test_what_makes_two_jobs_of_adapters_the_same(
    base: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    """Names and contents, not paths; a job without adapters has none of these fields."""
    job = write_job(tmp_path, base, pa.table({"q": ["a"], "which": ["one"]}))
    moved = shutil.copytree(adapters["one"], tmp_path / "moved")
    fields = []
    for paths in ({"x": adapters["one"]}, {"x": str(moved)}, {"x": adapters["a.b c"]}):
        _edit(job, model={"adapter": {"column": "which", "paths": paths}})
        fields.append(prepare_job(load_job(job), tmp_path).manifest().fingerprint_fields)
    assert fields[0] == fields[1]
    assert "peft" in prepare_job(load_job(job), tmp_path).manifest().versions
    differing = {name for name in fields[0] if fields[0][name] != fields[2][name]}
    assert differing == {"model.adapter[x]"}
    _edit(job, model={"adapter": None})
    plain = prepare_job(load_job(job), tmp_path).manifest()
    assert not [name for name in plain.fingerprint_fields if "adapter" in name]
    assert "peft" not in plain.versions
    _edit(job, model={"adapter": {"column": "witch", "paths": {"x": str(moved)}}})
    with pytest.raises(JobFileError, match="names 'witch', which the input does not have"):
        prepare_job(load_job(job), tmp_path)


def _edit(job: Path, **blocks: dict[str, Any]) -> None:
    """Changes settings of a job file."""
    values = yaml.safe_load(job.read_text())
    for name, block in blocks.items():
        values[name] = {**values.get(name, {}), **block}
    job.write_text(yaml.safe_dump(values, sort_keys=False))

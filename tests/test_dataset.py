"""Data sets of the `datasets` library become Parquet."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.dataset import DatasetRequest, stage_dataset
from pipeline.errors import InputError

FEATURES = datasets.Features(
    {
        "text": datasets.Value("large_string"),
        "label": datasets.ClassLabel(names=["no", "yes"]),
        "pair": {"x": datasets.Value("int8")},
        "grid": datasets.Array2D(shape=(1, 2), dtype="int32"),
    }
)
ROWS: list[dict[str, Any]] = [
    {"text": "ä", "label": 0, "pair": {"x": 1}, "grid": [[1, 2]]},
    {"text": None, "label": 1, "pair": {"x": 2}, "grid": [[3, 4]]},
    {"text": "c", "label": 1, "pair": None, "grid": [[5, 6]]},
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def _dataset() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS, features=FEATURES)


def _request(name: str, **changes: Any) -> DatasetRequest:
    values = {"config": None, "split": "train", "revision": None, "limit": None, **changes}
    return DatasetRequest(name, **values)


def test_saved_dataset_keeps_types_and_rows(tmp_path: Path) -> None:
    """A folder of save_to_disk comes out with the same Arrow types and the same values."""
    _dataset().save_to_disk(str(tmp_path / "saved"))
    staged, commit = stage_dataset(_request("saved"), tmp_path, tmp_path / "staging")
    table = pq.read_table(staged.path)
    assert table.to_pylist() == ROWS
    types = {field.name: field.type for field in table.schema}
    assert types["text"] == pa.large_string()
    assert types["label"] == pa.int64()
    assert types["pair"] == pa.struct([("x", pa.int8())])
    assert pa.types.is_list(types["grid"])
    assert (staged.name, staged.source, commit) == ("train", "saved", None)


def test_split_of_a_saved_dict(tmp_path: Path) -> None:
    """The split asked for is taken, and a wrong one is told which there are."""
    both = datasets.DatasetDict({"train": _dataset(), "test": _dataset().select([2])})
    both.save_to_disk(str(tmp_path / "saved"))
    staged, _ = stage_dataset(_request("saved", split="test"), tmp_path, tmp_path / "staging")
    assert pq.read_table(staged.path)["text"].to_pylist() == ["c"]
    with pytest.raises(InputError, match=r"no split 'val'.* train, test"):
        stage_dataset(_request("saved", split="val"), tmp_path, tmp_path / "staging")


def test_limit_and_reuse(tmp_path: Path) -> None:
    """A limit takes the first rows; the same request again makes no second folder."""
    _dataset().save_to_disk(str(tmp_path / "saved"))
    for _ in range(2):
        staged, _ = stage_dataset(_request("saved", limit=2), tmp_path, tmp_path / "staging")
        assert pq.read_table(staged.path)["label"].to_pylist() == [0, 1]
        assert len(list((tmp_path / "staging").iterdir())) == 1
    more, _ = stage_dataset(_request("saved", limit=9), tmp_path, tmp_path / "staging")
    assert pq.read_table(more.path).num_rows == 3


def test_other_content_has_another_digest(tmp_path: Path) -> None:
    """A folder saved again with other rows is seen to be another input."""
    _dataset().save_to_disk(str(tmp_path / "a"))
    _dataset().select([1, 0]).flatten_indices().save_to_disk(str(tmp_path / "b"))
    digests = [
        stage_dataset(_request(name), tmp_path, tmp_path / "staging")[0].digest for name in "aab"
    ]
    assert digests[0] == digests[1] != digests[2]


def test_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    """A plain folder is told about `input.path`."""
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match=r"not written by save_to_disk.* use input\.path"):
        stage_dataset(_request("plain"), tmp_path, tmp_path / "staging")


def test_unreachable_hub_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, a hub data set is an input error with the library's reason."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'nobody/nothing'.*cannot be loaded \(.*Hub") as caught:
        stage_dataset(_request("nobody/nothing"), tmp_path, tmp_path / "staging")
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in for the hub: a real builder over a local file, with a commit as its hash."""
    commit = "0123456789abcdef" * 2 + "01234567"
    (tmp_path / "rows.jsonl").write_text('{"q": "one"}\n{"q": "two"}\n')
    real = datasets.load_dataset_builder

    def load(name: str, config: str | None, *, revision: str | None) -> datasets.DatasetBuilder:
        files = {"train": str(tmp_path / "rows.jsonl")}
        builder = real("json", data_files=files, cache_dir=str(tmp_path / "cache"))
        builder.hash = commit
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    return commit


def test_hub_dataset_is_recorded_by_its_commit(tmp_path: Path, hub: str) -> None:
    """A branch name becomes the commit it stood for."""
    staged, commit = stage_dataset(_request("o/n", revision="main"), tmp_path, tmp_path / "staging")
    assert commit == hub
    assert pq.read_table(staged.path)["q"].to_pylist() == ["one", "two"]


def test_cached_dataset_of_another_commit_is_refused(tmp_path: Path, hub: str) -> None:
    """Offline, the library gives any cached revision; a pinned one must be the one asked for."""
    with pytest.raises(InputError, match=f"revision '{'f' * 40}', but only '{hub}'"):
        stage_dataset(_request("o/n", revision="f" * 40), tmp_path, tmp_path / "staging")


@pytest.mark.usefixtures("hub")
def test_unknown_split_of_a_hub_dataset(tmp_path: Path) -> None:
    """The library's own list of splits reaches the user."""
    with pytest.raises(InputError, match=r"split 'val', cannot be loaded .*\['train'\]"):
        stage_dataset(_request("o/n", split="val"), tmp_path, tmp_path / "staging")

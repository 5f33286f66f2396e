from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint import Checkpoint, fetch, fetch_once
from pipeline.errors import ModelError
from pipeline.model_files import digest, small_files, weight_files
from pipeline.settings import ModelSettings
from tests.closed import close


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of a model, free to be broken."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def fetched(folder: Path, **changes: Any) -> Checkpoint:
    """The checkpoint of a folder under these model settings."""
    return fetch(ModelSettings(path=str(folder), **changes))


def named(folder: Path) -> str:
    """The digest of a folder that need not be whole."""
    return digest(folder, small_files(folder), weight_files(folder))


def edit_json(path: Path, **changes: Any) -> None:
    """Changes values of a JSON file, or makes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def split(folder: Path) -> list[Path]:
    """Cuts the weights in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    paths = [
        folder / "model-00001-of-00002.safetensors",
        folder / "model-00002-of-00002.safetensors",
    ]
    weight_map = {}
    for path, part in zip(paths, (names[:5], names[5:]), strict=True):
        save_file({name: tensors[name] for name in part}, path, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, path.name))
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    return paths


def test_a_folder(folder: Path) -> None:
    """What is read off a whole model folder."""
    edit_json(folder / "generation_config.json", temperature=0.6)
    checkpoint = fetched(folder)
    assert checkpoint.folder == folder
    assert checkpoint.source == str(folder)
    assert checkpoint.revision is None
    assert checkpoint.context_length == 128
    assert checkpoint.has_chat_template
    assert checkpoint.generation_defaults["temperature"] == 0.6


def test_no_torch_is_needed(llama_folder: Path) -> None:
    """The driver checks a model without importing torch or transformers."""
    program = (
        "import sys\n"
        "from pipeline.checkpoint import fetch\n"
        "from pipeline.settings import ModelSettings\n"
        f"fetch(ModelSettings(path={str(llama_folder)!r}))\n"
        "sys.exit(str({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_positions": 1024, "n_ctx": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_context_length(folder: Path, config: dict[str, Any], expected: int | None) -> None:
    """Found under the names that configurations use, also for the text part of a larger model."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    assert fetched(folder).context_length == expected


@pytest.mark.parametrize("place", ["none", "config", "jinja", "additional"])
def test_chat_template(folder: Path, place: str) -> None:
    """Found in each of the places where transformers looks for one."""
    (folder / "chat_template.jinja").unlink()
    if place == "config":
        edit_json(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    if place == "jinja":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    if place == "additional":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    assert fetched(folder).has_chat_template == (place != "none")


def write_hole(path: Path, name: str) -> None:
    """Writes weights of one tensor: a terabyte of zeros that takes no space."""
    size = 2**40
    header = json.dumps({name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)


def damage_header(folder: Path) -> None:
    """Cuts the weights within their header."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def damage_data(folder: Path) -> None:
    """Cuts the last number off the weights."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def point_elsewhere(folder: Path) -> None:
    """Leaves what a clone without Git LFS leaves of the weights."""
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")


def lose_shard(folder: Path) -> None:
    """Cuts the weights in two files and deletes one."""
    split(folder)[1].unlink()


def only_pickle(folder: Path) -> None:
    """Leaves the weights in a file that looks like a pickle."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove(*names: str) -> Callable[[Path], None]:
    """Deletes files."""

    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def index_of_pickle(folder: Path) -> None:
    """Leaves no weights but an index of pickles that are not there."""
    (folder / "model.safetensors").unlink()
    edit_json(folder / "pytorch_model.bin.index.json", weight_map={"w": "pytorch_model-1.bin"})


def configure(**changes: Any) -> Callable[[Path], None]:
    """Changes the configuration."""
    return lambda folder: edit_json(folder / "config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "settings", "words"),
    [
        (remove("config.json"), {}, ["no config.json"]),
        (remove("tokenizer.json"), {}, ["no tokenizer", "save_pretrained"]),
        (remove("model.safetensors"), {}, ["no weights"]),
        (only_pickle, {}, ["pickle", "model.allow_pickle: true"]),
        (index_of_pickle, {}, ["pickle", "model.allow_pickle: true"]),
        (index_of_pickle, {"allow_pickle": True}, ["pytorch_model-1.bin"]),
        (lose_shard, {}, ["names 2 weight files", "model-00002-of-00002.safetensors"]),
        (damage_header, {}, ["model.safetensors", "not a whole safetensors"]),
        (damage_data, {}, ["model.safetensors", "download it again"]),
        (point_elsewhere, {}, ["model.safetensors", "not a whole safetensors"]),
        (configure(auto_map={"AutoModel": "m.M"}, model_type="mine"), {}, ["trust_remote_code"]),
        (
            configure(quantization_config={"quant_method": "gptq"}),
            {"quantization": "nf4"},
            ["'nf4'", "gptq", "leave model.quantization out"],
        ),
        (lambda folder: None, {"revision": "main"}, ["model.revision", "'main'"]),
        (lambda folder: (folder / "config.json").write_text("{"), {}, ["config.json", "not JSON"]),
        (lambda folder: (folder / "config.json").write_text("[1]"), {}, ["not a JSON object"]),
    ],
)
def test_what_is_wrong_with_a_folder(
    folder: Path, damage: Callable[[Path], object], settings: dict[str, Any], words: list[str]
) -> None:
    """Each fault is found before anything is loaded, and the sentence says what to do."""
    damage(folder)
    with pytest.raises(ModelError) as caught:
        fetched(folder, **settings)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("closed", [".", ".."])
@pytest.mark.parametrize("fetcher", [fetch, fetch_once])
def test_a_folder_that_is_closed_to_us(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    closed: str,
    fetcher: Callable[[ModelSettings], object],
) -> None:
    """Neither its files nor, if a folder above may not be entered, itself can be looked at."""
    close(folder if closed == "." else folder.parent, monkeypatch)
    with pytest.raises(ModelError, match=r"model '.*' cannot be read \(Permission denied\)"):
        fetcher(ModelSettings(path=str(folder)))


@pytest.mark.parametrize(
    ("damage", "settings"),
    [
        (only_pickle, {"allow_pickle": True}),
        (configure(auto_map={"AutoModel": "m.M"}, model_type="mine"), {"trust_remote_code": True}),
        (configure(auto_map={"AutoModel": "m.M"}), {}),
        (configure(quantization_config={"quant_method": "fp8"}), {}),
        (split, {}),
    ],
    ids=["pickle allowed", "code trusted", "code not needed", "quantized as stored", "in parts"],
)
def test_what_is_not_wrong(
    folder: Path, damage: Callable[[Path], object], settings: dict[str, Any]
) -> None:
    """The same cases with consent, and code of an architecture that transformers has itself."""
    damage(folder)
    assert fetched(folder, **settings).folder == folder


def test_digest_names_the_content(folder: Path, tmp_path: Path) -> None:
    """Not the folder and not the times of its files."""
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    for path in moved.iterdir():
        os.utime(path, (0, 0))
    (moved / "README.md").write_text("A model.")
    assert named(moved) == named(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_digest_covers_small_files(folder: Path, name: str) -> None:
    """One other character anywhere in what decides an answer gives another digest."""
    before = named(folder)
    (folder / name).write_text((folder / name).read_text()[:-1] + "#")
    assert named(folder) != before


@pytest.mark.parametrize("num_files", [1, 2])
def test_digest_covers_weights(folder: Path, num_files: int) -> None:
    """Every weight file counts, with its header, so that other weights give another digest."""
    paths = split(folder) if num_files == 2 else [folder / "model.safetensors"]
    digests = {named(folder)}
    for path in paths:
        tensors = load_file(path)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, {"format": "pt"})
        digests.add(named(folder))
    assert len(digests) == num_files + 1


def test_digest_reads_little_of_large_weights(folder: Path) -> None:
    """A file of a terabyte (here a hole) costs as little as one of some megabytes."""
    path = folder / "model.safetensors"
    write_hole(path, "w")
    before = fetched(folder).digest
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert fetched(folder).digest != before


def test_digest_covers_all_of_a_header(folder: Path) -> None:
    """Also what stands far behind its start, where no chunk is read: names and shapes."""
    digests = set()
    for name in ("first", "other"):
        write_hole(folder / "model.safetensors", "x" * 300_000 + name)
        digests.add(fetched(folder).digest)
    assert len(digests) == 2

"""GGUF: the header read without torch, files that are not whole, and whole models from one file."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest

from benchmarks.quantized_models import save_gguf
from pipeline.checkpoint import Checkpoint, fetch
from pipeline.engine import build_engine
from pipeline.errors import ModelError
from pipeline.footprint import estimate_footprint
from pipeline.gguf import BLOCKS, read_header
from pipeline.model import Model
from pipeline.records import Sampling
from pipeline.settings import EngineSettings, ModelSettings
from tests.engines import PROMPTS, requests_for, run
from tests.models import load, make_llama, sentencepiece_tokenizer

NAME = "model-F32.gguf"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped keys and rows of whole blocks."""
    return make_llama(tmp_path_factory.mktemp("source") / "model", hidden_size=64)


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as GGUF: nothing else is in the folder."""
    made = tmp_path_factory.mktemp("gguf")
    for kind in ("F32", "Q8_0", "Q4_0"):
        save_gguf(source, made, kind=kind, tokenizer=True)
    return made


def fetched(folder: Path, **settings: Any) -> Checkpoint:
    """The checkpoint under these settings."""
    return fetch(ModelSettings(path=str(folder), **{"gguf_file": NAME, **settings}))


def answers(model: Model) -> list[str | None]:
    """Greedy completions of the usual prompts."""
    requests = requests_for(model, Sampling(16))
    return [done.text for done in run(build_engine(model, EngineSettings()), requests)]


def test_block_sizes_are_those_of_the_format() -> None:
    """Compared with the table of the format's own package, so that no size is mistyped."""
    ours = {kind: (n, kinds[kind]) for n, kinds in BLOCKS.items() for kind in kinds}
    theirs = {kind.value: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert ours == {kind: theirs[kind] for kind in ours}
    assert {"Q4_K", "Q6_K", "IQ4_XS", "BF16"} <= {gguf.GGMLQuantizationType(k).name for k in ours}


def test_what_a_header_tells(source: Path, folder: Path) -> None:
    """Sizes under the names of a config.json, weights counted, without torch or the package."""
    header = read_header(folder / NAME)
    plain = load(source)
    assert header.config["max_position_embeddings"] == 128
    assert header.config["num_key_value_heads"] == 2
    assert header.num_weights == sum(p.numel() for p in plain.model.parameters())
    assert (header.has_tokenizer, header.has_chat_template) == (True, True)


def test_a_checkpoint_of_one_file(folder: Path) -> None:
    """All that a job needs is known from the file alone, and other weights are another model."""
    checkpoint = fetched(folder)
    assert checkpoint.weights == (folder / NAME,)
    assert (checkpoint.quantization, checkpoint.context_length) == ("gguf", 128)
    assert checkpoint.has_chat_template
    assert checkpoint.digest != fetched(folder, gguf_file="model-Q8_0.gguf").digest


def test_unquantized_gguf_is_the_same_model(source: Path, folder: Path) -> None:
    """Float32 in GGUF: every answer as from safetensors, its own tokenizer included."""
    assert answers(load(folder, gguf_file=NAME)) == answers(load(source))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_gguf_is_near(source: Path, folder: Path, kind: str) -> None:
    """Its weights are those of the original up to rounding, and the estimate is what it takes."""
    name = f"model-{kind}.gguf"
    model, plain = load(folder, gguf_file=name, dtype="bfloat16"), load(source)
    for mine, theirs in zip(model.model.parameters(), plain.model.parameters(), strict=True):
        rounding = 0.01 if kind == "Q8_0" else 0.15
        assert (mine.float() - theirs).norm() <= rounding * theirs.norm()
    settings = ModelSettings(path=str(folder), gguf_file=name, dtype="bfloat16")
    estimate = estimate_footprint(fetch(settings), settings)
    assert estimate.weights == pytest.approx(model.num_weight_bytes, rel=0.02)
    assert estimate.cache_per_token == 2 * 2 * 2 * 16 * 2
    assert "gguf (bfloat16)" in model.summary
    assert None not in answers(model)


def test_a_tokenizer_beside_the_file_is_used(source: Path, folder: Path, tmp_path: Path) -> None:
    """A tokenizer's own files say more of it than GGUF does."""
    shutil.copy(folder / NAME, tmp_path / NAME)
    own = sentencepiece_tokenizer()
    own.chat_template = "{{ messages[0].content }}, its own template"
    own.save_pretrained(tmp_path)
    assert fetched(tmp_path).has_chat_template
    model = load(tmp_path, gguf_file=NAME)
    assert model.tokenizer.get_chat_template() == own.chat_template
    assert model.tokenizer.encode(PROMPTS[0]) == own.encode(PROMPTS[0])
    assert own.encode(PROMPTS[0]) != load(source).tokenizer.encode(PROMPTS[0])


def test_a_file_without_a_tokenizer(source: Path, tmp_path: Path) -> None:
    """It takes the files beside it, and is refused without them."""
    save_gguf(source, tmp_path, kind="F32")
    assert answers(load(tmp_path, gguf_file=NAME)) == answers(load(source))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        fetched(tmp_path)


def cut(path: Path) -> None:
    """Takes the last bytes off."""
    path.write_bytes(path.read_bytes()[:-64])


def cut_header(path: Path) -> None:
    """Leaves half of the metadata."""
    path.write_bytes(path.read_bytes()[:300])


def cut_far(path: Path) -> None:
    """Claims a text longer than any file."""
    content = bytearray(path.read_bytes())
    content[24:32] = struct.pack("<Q", 2**62)
    path.write_bytes(content)


def change_version(path: Path) -> None:
    """Makes it one of a version that is yet to come."""
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", 9)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "settings", "words"),
    [
        (cut, {}, ["bytes where its header asks for", "download it again"]),
        (cut_header, {}, [NAME, "not a whole GGUF file"]),
        (cut_far, {}, [NAME, "not a whole GGUF file"]),
        (change_version, {}, ["version 9", "versions 2 and 3"]),
        (lambda path: path.write_text("version https://git-lfs"), {}, ["not a GGUF file"]),
        (lambda path: None, {"gguf_file": "other.gguf"}, ["'other.gguf'", f"there are {NAME}"]),
        (lambda path: None, {"gguf_file": None}, ["set model.gguf_file", NAME]),
        (lambda path: None, {"quantization": "nf4"}, ["'nf4'", "quantized already (gguf)"]),
    ],
)
def test_what_is_wrong(
    folder: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    settings: dict[str, Any],
    words: list[str],
) -> None:
    """Each is one sentence, before anything is loaded."""
    shutil.copy(folder / NAME, tmp_path / NAME)
    damage(tmp_path / NAME)
    with pytest.raises(ModelError) as caught:
        fetched(tmp_path, **settings)
    assert all(word in str(caught.value) for word in words)


def test_the_path_of_the_file_itself(folder: Path) -> None:
    """A natural mistake, and what to write instead."""
    with pytest.raises(ModelError, match=r"is a file: set it to the folder.*model\.gguf_file"):
        fetched(folder / NAME)


def test_part_of_a_split_model(tmp_path: Path) -> None:
    """transformers would load a part as if it were the model."""
    writer = gguf.GGUFWriter(tmp_path / NAME, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"one of 3 files.*llama-gguf-split --merge"):
        fetched(tmp_path)


def test_only_the_file_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the other quantizations of the same repository, nor its safetensors."""
    calls: list[list[str]] = []

    def download(repo_id: str, allow_patterns: list[str], **options: Any) -> str:
        calls.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetch(ModelSettings(path="org/name", gguf_file=NAME))
    names = [NAME, "model-Q8_0.gguf", "model.safetensors", "tokenizer.json"]
    chosen = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=calls[0])
    assert sorted(chosen) == [NAME, "tokenizer.json"]

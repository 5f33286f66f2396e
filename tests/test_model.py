from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from pipeline.engine import build_engine
from pipeline.errors import ModelError, ResourceError
from pipeline.model import Model, describe
from pipeline.records import Request, RequestId, Sampling
from pipeline.settings import EngineSettings
from tests.engines import run
from tests.models import (
    BOS_ID,
    EOS_ID,
    IM_END_ID,
    PAD_ID,
    VOCABULARY_SIZE,
    byte_level_tokenizer,
    load,
    make_llama,
)


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of a model, free to be broken."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    """Changes values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def answer(model: Model) -> str | None:
    """The greedy completion of one prompt."""
    engine = build_engine(model, EngineSettings())
    prompt = tuple(model.tokenizer.encode("Question: If 12"))
    (completion,) = run(engine, [Request(RequestId(0, 0, 0), prompt, Sampling(8))])
    assert completion.error is None
    return completion.text


def test_a_plain_model(llama: Model) -> None:
    """What is known of a model after loading; nothing is odd about this one."""
    assert llama.device == torch.device("cpu")
    assert llama.dtype is torch.float32
    assert llama.eos_ids == {EOS_ID}
    assert llama.pad_id == PAD_ID
    assert llama.context_length == 128
    assert llama.num_embeddings == VOCABULARY_SIZE
    assert llama.num_parameters * 4 <= llama.num_weight_bytes
    assert llama.tokenizer.padding_side == "left"
    assert not llama.model.training
    assert llama.notes == ()
    assert "LlamaForCausalLM" in llama.summary
    assert " on cpu, loaded in " in llama.summary
    assert llama.devices == (torch.device("cpu"),)
    assert llama.peak.host > llama.num_weight_bytes
    assert llama.peak.gpus == ()


def test_ends_from_config_and_tokenizer(folder: Path) -> None:
    """A list in the generation config and the tokenizer's own token all end a completion."""
    edit_json(folder / "generation_config.json", eos_token_id=[7, IM_END_ID])
    assert load(folder).eos_ids == {7, IM_END_ID, EOS_ID}


def test_negative_end_is_none(folder: Path) -> None:
    """Some configurations say -1 for none; nothing may be padded or ended with that."""
    edit_json(folder / "generation_config.json", eos_token_id=[-1, 7])
    assert load(folder).eos_ids == {7, EOS_ID}


def test_nothing_of_the_generation_config_is_left(folder: Path) -> None:
    """What a model's files ask of `generate` reaches it through the job or not at all."""
    plain = answer(load(folder))
    edit_json(
        folder / "generation_config.json",
        do_sample=True,
        temperature=5.0,
        repetition_penalty=3.0,
        no_repeat_ngram_size=2,
        suppress_tokens=list(range(300)),
        max_length=9,
    )
    model = load(folder)
    assert answer(model) == plain
    assert any("no_repeat_ngram_size, suppress_tokens" in note for note in model.notes)


def test_no_padding_token(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Padding is then done with the end-of-sequence token, and said once."""
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    with caplog.at_level(logging.INFO, "pipeline"):
        model = load(folder)
    assert model.pad_id == EOS_ID
    assert len(model.notes) == 1
    assert caplog.text.count("no padding token") == 1


def test_padding_token_without_embedding(folder: Path) -> None:
    """A padding token added to the tokenizer alone would be out of the model's table."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    model = load(folder)
    assert model.tokenizer.pad_token_id >= model.num_embeddings
    assert model.pad_id == EOS_ID


def test_neither_padding_nor_end(tmp_path: Path) -> None:
    """A model that gives no token to pad with is refused, with what to set."""
    folder = make_llama(tmp_path, eos_token_id=None, pad_token_id=None)
    edit_json(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(ModelError, match="set pad_token in its"):
        load(folder)


def save_t5(folder: Path) -> None:
    """An encoder-decoder."""
    config = T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def save_bert(folder: Path) -> None:
    """A masked language model."""
    config = BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(config).save_pretrained(folder)


def save_headless(folder: Path) -> None:
    """A Llama without the matrix that makes logits."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    LlamaModel(config).save_pretrained(folder)


def save_unheard_of(folder: Path) -> None:
    """An architecture that transformers does not have."""
    save_headless(folder)
    edit_json(folder / "config.json", model_type="unheard_of")


def save_misshapen(folder: Path) -> None:
    """Weights of other shapes than the configuration says."""
    make_llama(folder)
    edit_json(folder / "config.json", hidden_size=64)


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (save_t5, "encoder-decoder"),
        (save_bert, "masked language"),
        (save_headless, r"lacks 1 weights .*\(lm_head.weight is one\)"),
        (save_unheard_of, "unheard_of"),
        (save_misshapen, "cannot be loaded"),
    ],
)
def test_no_causal_language_model(tmp_path: Path, save: Any, words: str) -> None:
    """A model that would load and answer nonsense, or not load at all, is refused."""
    save(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words) as caught:
        load(tmp_path)
    assert "ModelError" not in str(caught.value)  # our own sentence, not one about it


def test_dtype(llama_folder: Path) -> None:
    """The setting overrides what the checkpoint holds."""
    model = load(llama_folder, dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_quantized_model(
    tmp_path: Path, quantization: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its layers are smaller, it generates, and the library's warnings come once at most."""
    folder = make_llama(tmp_path, hidden_size=64, num_attention_heads=4)
    model = load(folder, quantization=quantization)
    assert type(model.model.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    assert model.num_weight_bytes < 0.75 * load(folder).num_weight_bytes
    layer = model.model.model.layers[0].mlp.up_proj
    assert getattr(layer.weight, "quant_type", "int8") == quantization
    assert quantization in model.summary
    assert answer(model) is not None
    assert caplog.text.count("inputs will be cast") <= 1


def test_int8_warning_is_shown_once(llama: Model, caplog: pytest.LogCaptureFixture) -> None:
    """On a GPU, int8 layers log the same sentence for every product."""
    for dtype in ("one", "another", "one"):
        logging.getLogger("bitsandbytes.autograd._functions").warning("cast from %s", dtype)
    assert caplog.text.count("cast from") == 1


def test_quantization_needs_bitsandbytes(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The missing package is named."""
    module = "transformers.quantizers.quantizer_bnb_4bit"
    monkeypatch.setattr(f"{module}.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError, match="bitsandbytes"):
        load(llama_folder, quantization="nf4")


def test_vocabulary(llama: Model) -> None:
    """Decoding leaves special tokens out and spaces as they are; special tokens are known."""
    ids = llama.tokenizer.encode("so , it rests .")
    assert llama.vocabulary.decode([BOS_ID, *ids, EOS_ID]) == "so , it rests ."
    assert llama.vocabulary.special_ids["<|im_end|>"] == IM_END_ID
    assert llama.vocabulary.size == VOCABULARY_SIZE


def drop_added_tokens(folder: Path) -> None:
    """A tokenizer.json without a part that transformers takes for granted."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    del tokenizer["added_tokens"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def break_tokenizer(folder: Path) -> None:
    """One that the Rust library refuses, with a bare Exception."""
    edit_json(folder / "tokenizer.json", model={"type": "BPE", "vocab": 3, "merges": []})


BREAKAGES: dict[str, Any] = {
    "no added tokens": drop_added_tokens,
    "tokenizer model": break_tokenizer,
    "tokenizer list": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "tokenizer torn": lambda folder: (folder / "tokenizer.json").write_text('{"version": '),
    "tokenizer class": lambda folder: edit_json(
        folder / "tokenizer_config.json", tokenizer_class=["x"]
    ),
    "tokenizer special": lambda folder: edit_json(folder / "tokenizer_config.json", eos_token=7),
    "size as text": lambda folder: edit_json(folder / "config.json", hidden_size="32"),
    "size as list": lambda folder: edit_json(folder / "config.json", hidden_size=[32]),
    "no heads": lambda folder: edit_json(folder / "config.json", num_attention_heads=0),
    "activation": lambda folder: edit_json(folder / "config.json", hidden_act="no such"),
    "rope": lambda folder: edit_json(folder / "config.json", rope_parameters="none"),
    "end as text": lambda folder: edit_json(folder / "generation_config.json", eos_token_id="2"),
    "end as part": lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[1.5]),
    "ends in ends": lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[[2]]),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_files(folder: Path, name: str) -> None:
    """Whatever the libraries make of them, it is one line that names the model."""
    BREAKAGES[name](folder)
    with pytest.raises(ModelError, match=f"^model '{folder}' ") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("added_tokens"), "KeyError: 'added_tokens'"),
        (AssertionError(), "AssertionError"),
        (ValueError("no such\n  value"), "no such value"),
        (ValueError("x"), "ValueError: x"),
        (Exception("data did not match"), "Exception: data did not match"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (RuntimeError("many words " * 99), "many words " * 54 + "many w…"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_description_of_an_error(error: Exception, words: str) -> None:
    """One line, with the type where the text alone says little."""
    assert describe(error) == words


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=["device", "host"]
)
@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoModelForCausalLM"])
def test_out_of_memory(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    """No fault of the model's files: other settings, or another machine, will do."""

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(f"pipeline.model.{name}.from_pretrained", fail)
    with pytest.raises(ResourceError, match="does not fit into"):
        load(llama_folder)


def test_interrupt_is_no_matter_of_the_model(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while loading stays what it is."""

    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.model.AutoTokenizer.from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(llama_folder)

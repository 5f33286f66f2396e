"""LoRA adapters: one or several, on plain and quantized models, through both engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from jobs.config import load_job
from pipeline.adapter_choice import AdapterChoice
from pipeline.adapter_settings import AdapterSettings
from pipeline.checkpoint import fetch
from pipeline.engine import build_engine
from pipeline.errors import JobFileError, ModelError, RowError
from pipeline.footprint import estimate_footprint
from pipeline.model import Model
from pipeline.records import Request, Sampling
from pipeline.self_check import Batches, self_check
from pipeline.settings import EngineSettings, ModelSettings
from tests.engines import check_alone, requests_for, run
from tests.lora import make_lora, make_two_loras, random_lora
from tests.models import load, make_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_ch:FutureWarning")  # peft's
PREFIX = "Question: If 12 apples cost 3 dollars, how much do 20 apples cost? " * 2
"""Long enough that the engine computes it once for all prompts that begin with it."""
PROMPTS = [f"{PREFIX}{end}" for end in ("Answer:", "dog", "x y z", "The", "Answer:")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 256 positions."""
    folder = tmp_path_factory.mktemp("base") / "model"
    return make_llama(folder, max_position_embeddings=256, hidden_size=64)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two adapters of it."""
    return make_two_loras(base, tmp_path_factory.mktemp("adapters"))


def requests_of(model: Model, adapter: str = "") -> list[Request]:
    """The usual prompts and some that share a beginning."""
    requests = requests_for(model, Sampling(16), PROMPTS)
    return [replace(request, adapter=adapter) for request in requests]


def answers(model: Model, requests: list[Request], kind: str = "continuous") -> list[str | None]:
    """What the engine says, each without an error."""
    settings = EngineSettings(kind=kind, batch_size=4)
    completions = run(build_engine(model, settings), requests)
    assert not [completion.error for completion in completions if completion.error]
    return [completion.text for completion in completions]


def several(base: Path, adapters: dict[str, str], **settings: Any) -> Model:
    """A model whose rows choose."""
    adapter = AdapterSettings(column="a", paths=adapters)
    return load(base, adapter=adapter, **settings)


def test_one_adapter_answers_as_peft_does(base: Path, adapters: dict[str, str]) -> None:
    """Each row as transformers' own `generate` has it, on a model that peft has loaded."""
    model = load(base, adapter=adapters["one"])
    reference = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapters["one"]
    ).get_base_model()
    requests = requests_of(model)
    for request, completion in zip(
        requests, run(build_engine(model, EngineSettings()), requests), strict=True
    ):
        check_alone(replace(model, model=reference), request, completion)
    assert answers(model, requests) != answers(load(base), requests)
    assert "1 LoRA adapter," in model.summary


def test_rows_that_choose_run_in_slots(base: Path, adapters: dict[str, str]) -> None:
    """The self-check holds each row against its own adapter, and not against another one's."""
    check = self_check(several(base, adapters), EngineSettings())
    assert (check.batches, check.rejected) == (Batches.SLOTS, ())


def test_a_merged_adapter_is_the_same(base: Path, adapters: dict[str, str]) -> None:
    """And its layers are plain ones again, so that it costs nothing."""
    merged = load(base, adapter={"path": adapters["one"], "merge": True})
    requests = requests_of(merged)
    assert answers(merged, requests) == answers(load(base, adapter=adapters["one"]), requests)
    assert type(merged.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_what_the_trainer_saves(base: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    """Its folder works as it is, with whatever else is in it."""
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True)
    trainer = Trainer(model=random_lora(base, seed=1), args=arguments)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load(base, adapter=str(tmp_path / "saved"))
    requests = requests_of(saved)
    assert answers(saved, requests) == answers(load(base, adapter=adapters["one"]), requests)


@pytest.mark.parametrize("kind", ["continuous", "static"])
def test_rows_of_several_adapters_together(base: Path, adapters: dict[str, str], kind: str) -> None:
    """Each row has the answer it gets with that adapter alone, and base rows the model's own.

    The same prompts for all: neither a whole prompt nor a shared beginning is taken for another's.
    """
    model = several(base, adapters)
    alone = {name: load(base, adapter=path) for name, path in adapters.items()} | {"": load(base)}
    mixed: list[Request] = []
    expected: list[str | None] = []
    for row, names in enumerate(zip(*(requests_of(model, name) for name in alone), strict=True)):
        mixed += [
            replace(request, id=request.id._replace(row=3 * row + n))
            for n, request in enumerate(names)
        ]
    for request in mixed:
        plain = replace(request, adapter="")
        expected += answers(alone[request.adapter], [plain], kind)
    assert answers(model, mixed, kind) == expected
    assert len({*expected[:3]}) == 3


def test_a_beginning_is_not_kept_for_the_next_adapter(base: Path, adapters: dict[str, str]) -> None:
    """The same prompts twice through one engine: with one adapter, then with another."""
    model = several(base, adapters)
    engine = build_engine(model, EngineSettings(batch_size=4))
    for name, path in adapters.items():
        texts = [completion.text for completion in run(engine, requests_of(model, name))]
        alone = load(base, adapter=path)
        assert texts == answers(alone, requests_of(alone))


@pytest.mark.parametrize("quantization", ["int8", "nf4", "torchao-int8"])
def test_adapters_on_a_quantized_model(
    base: Path, adapters: dict[str, str], quantization: str
) -> None:
    """Each row of a mixed batch as the quantized model with that adapter alone has it."""
    model = several(base, adapters, quantization=quantization)
    for name, path in adapters.items():
        alone = load(base, adapter=path, quantization=quantization)
        first = requests_of(model, name)[:1]
        others = [replace(requests_of(model)[1], id=first[0].id._replace(row=9))]
        if quantization == "int8":
            others = []  # it rounds a row by the others of its batch, with and without adapters
        mixed = answers(model, [*first, *others])
        assert mixed[0] == answers(alone, [replace(first[0], adapter="")])[0]


def test_adapters_are_in_the_estimate(base: Path, adapters: dict[str, str]) -> None:
    """Each of them lies beside the model; a merged one takes nothing."""
    sizes = []
    for adapter in ({"column": "a", "paths": adapters}, {"path": adapters["one"], "merge": True}):
        settings = ModelSettings(path=str(base), adapter=AdapterSettings(**adapter))
        sizes.append(estimate_footprint(fetch(settings), settings).weights)
    several_loaded = several(base, adapters).num_weight_bytes
    assert sizes[0] - sizes[1] == pytest.approx(
        several_loaded - load(base).num_weight_bytes, rel=0.2
    )


@pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning")
@pytest.mark.parametrize("quantization", ["int8", "nf4", "torchao-int8"])
def test_merging_into_a_quantized_model(
    base: Path, adapters: dict[str, str], quantization: str
) -> None:
    """The weights are rounded again, but the adapter is in them."""
    tokens = torch.arange(5, 25)[None]
    path = adapters["one"]
    merged, unmerged, plain = (
        load(base, adapter=adapter, quantization=quantization).model(tokens).logits
        for adapter in ({"path": path, "merge": True}, path, None)
    )
    assert (merged - unmerged).norm() < 0.5 * (plain - unmerged).norm()


def rename(folder: Path, old: str, new: str) -> None:
    """Renames a file of an adapter."""
    (folder / old).rename(folder / new)


def configure(**changes: Any) -> Callable[[Path], None]:
    """Changes an adapter's configuration."""

    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), ["holds no adapter_config.json"]),
        (lambda f: (f / "adapter_model.safetensors").unlink(), ["holds no weights"]),
        (
            lambda f: rename(f, "adapter_model.safetensors", "adapter_model.bin"),
            ["pickle", "model.allow_pickle: true"],
        ),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99),
            ["not a whole safetensors file"],
        ),
        (configure(r=16), ["weights of rank 4", "r is 16"]),
        (configure(peft_type="IA3"), ["is IA3", "only LoRA"]),
        (configure(alora_invocation_tokens=[1]), ["activated LoRA"]),
        (configure(target_modules=["q_proj"]), ["does not go with model", "have no place"]),
        (configure(target_modules=["q_proj", "v_proj", "up_proj", "o_proj"]), ["are missing"]),
        (configure(target_modules=["c_attn"]), ["does not go with model", "c_attn"]),
    ],
)
def test_what_is_wrong_with_an_adapter(
    base: Path,
    adapters: dict[str, str],
    tmp_path: Path,
    damage: Callable[[Path], object],
    words: list[str],
) -> None:
    """Each is one sentence with the adapter's name; peft would only warn of some."""
    folder = Path(shutil.copytree(adapters["one"], tmp_path / "adapter"))
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load(base, adapter=str(folder))
    assert all(word in str(caught.value) for word in [*words, str(folder)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"hidden_size": 32}, "size mismatch"), ({"num_hidden_layers": 1}, "have no place")],
)
def test_an_adapter_of_another_model(
    adapters: dict[str, str], tmp_path: Path, changes: dict[str, int], words: str
) -> None:
    """It names the model that the adapter was trained on; a shorter model is no base either."""
    other = make_llama(tmp_path / "other", **{"hidden_size": 64, **changes})
    with pytest.raises(ModelError, match=rf"{words}") as caught:
        load(other, adapter=adapters["one"])
    assert "it was trained on" in str(caught.value)


def test_adapters_that_cannot_share_a_batch(base: Path, tmp_path: Path) -> None:
    """DoRA runs alone, and is refused among several before the first row."""
    path = str(make_lora(base, tmp_path / "dora", use_dora=True))
    alone = load(base, adapter=path)
    assert None not in answers(alone, requests_of(alone))
    with pytest.raises(ModelError, match="has use_dora, which works only"):
        several(base, {"dora": path})


def test_layers_that_cannot_share_a_batch(
    base: Path, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of gptqmodel, which peft gives one adapter at a time."""
    monkeypatch.setattr("pipeline.adapters.MIXING_MODULES", ())
    with pytest.raises(ModelError, match="layers of the kind Linear cannot have in one batch"):
        several(base, adapters)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("{merge: true}", "needs exactly one of 'path' and 'paths'"),
        ("{path: x, paths: {a: b}, column: c}", "needs exactly one of 'path' and 'paths'"),
        ("{paths: {a: b}}", "needs 'column' and 'paths' together"),
        ("{path: x, column: c}", "needs 'column' and 'paths' together"),
        ("{paths: {a: b}, column: c, merge: true}", "can merge one adapter"),
        ("{paths: {}, column: c}", "needs at least one in 'paths'"),
        ("{path: x, merged: true}", "did you mean 'model.adapter.merge'"),
        ("3", "'model.adapter' must be a block of settings"),
    ],
)
def test_wrong_settings(tmp_path: Path, adapter: str, words: str) -> None:
    """Each names what is asked for."""
    text = "name: x\ninput: {path: x}\nprompt: {template: x}\noutput: {path: x}\n"
    (tmp_path / "job.yaml").write_text(f"{text}model: {{path: x, adapter: {adapter}}}")
    with pytest.raises(JobFileError) as caught:
        load_job(tmp_path / "job.yaml")
    assert words in str(caught.value)


def test_paths_are_relative_to_the_job_file(tmp_path: Path) -> None:
    """As all others; what is no folder is left as it is, for the hub."""
    (tmp_path / "mine").mkdir()
    text = "name: x\ninput: {path: x}\nprompt: {template: x}\noutput: {path: x}\n"
    blocks = ("mine", "{path: mine}", "{column: c, paths: {a: mine, b: org/hub}}")
    for block, paths in zip(blocks, ({"": 1}, {"": 1}, {"a": 1, "b": 0}), strict=True):
        (tmp_path / "job.yaml").write_text(f"{text}model: {{path: x, adapter: {block}}}")
        adapter = load_job(tmp_path / "job.yaml").model.adapter
        assert adapter is not None
        assert adapter.named_paths == {
            name: str(tmp_path / "mine") if is_local else "org/hub"
            for name, is_local in paths.items()
        }


def test_an_adapter_of_the_hub(
    base: Path, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its own two files are fetched, and what goes wrong names the setting."""
    calls: list[list[str]] = []

    def download(repo_id: str, allow_patterns: list[str], **options: Any) -> str:
        calls.append(allow_patterns)
        return adapters["one"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = fetch(ModelSettings(path=str(base), adapter="org/adapter"))
    assert checkpoint.adapters[0].folder == Path(adapters["one"])
    assert calls == [["adapter_config.json", "adapter_model.safetensors"]]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _no_such_file)
    with pytest.raises(ModelError, match=r"^model\.adapter 'no/such/folder' is neither"):
        fetch(ModelSettings(path=str(base), adapter="no/such/folder"))


def _no_such_file(*args: Any, **options: Any) -> str:
    raise OSError("no such file")


def test_peft_is_asked_for(
    base: Path, adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The missing package is one sentence with the command."""
    monkeypatch.setattr("pipeline.extras.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"model\.adapter needs peft.*'shardmill\[adapters\]'"):
        fetch(ModelSettings(path=str(base), adapter=adapters["one"]))


def test_only_lora_is_let_through(base: Path, tmp_path: Path) -> None:
    """Another method's folder, as its library has written it."""
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is IA3, and only LoRA"):
        load(base, adapter=str(tmp_path))


def test_what_a_row_may_choose() -> None:
    """Null and empty are none; any other value must be a name."""
    choice = AdapterChoice("a", ("one", "two"))
    made = [choice.made_by({"a": value}) for value in ("one", None, "", "two")]
    assert made == ["one", "", "", "two"]
    for value in ("three", 1, ["one"]):
        with pytest.raises(RowError, match=r"adapter: column 'a' has .*; there are 'one', 'two'"):
            choice.made_by({"a": value})

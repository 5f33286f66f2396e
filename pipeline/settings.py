"""The blocks of a job file that the pipeline reads.

They stand apart from the modules they configure, because a job file is checked, and its JSON
Schema printed, without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from pipeline.adapter_settings import AdapterSettings
from pipeline.block import Settings as Settings
from pipeline.errors import JobFileError, ModelError
from pipeline.quantization_settings import QuantizationSettings
from pipeline.records import Sampling

Value = TypeVar("Value", int, float)


class PromptSettings(Settings):
    """How a row becomes a prompt."""

    template: str | None = Field(
        default=None,
        description="Sandboxed Jinja over the row's columns, such as 'Q: {{ question }}\\nA:'.",
    )
    messages: str | None = Field(
        default=None,
        description="Name of a column of chat messages (a list of role and content), "
        "rendered through the model's chat template.",
    )
    chat_template: bool = Field(
        default=False,
        description="Send the rendered template as the user's turn through the model's chat "
        "template.",
    )
    system: str | None = Field(
        default=None, description="System prompt put before the chat; needs a chat template."
    )
    overlong: Literal["error", "truncate_left", "truncate_right"] = Field(
        default="error",
        description="What becomes of a prompt that leaves no room for generation.max_new_tokens "
        "in the model's context: an error row, or it loses tokens at its beginning "
        "(truncate_left; a beginning-of-sequence token stays) or at its end; not with a chat "
        "template.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> PromptSettings:
        if (self.template is None) == (self.messages is None):
            raise ValueError("needs exactly one of 'template' and 'messages'")
        if self.system is not None and not self.uses_chat_template:
            raise ValueError("'system' needs 'chat_template: true' or 'messages'")
        if self.overlong != "error" and self.uses_chat_template:
            raise ValueError(
                f"'overlong: {self.overlong}' would cut through the chat template's own tokens; "
                "it goes with a plain 'template' only"
            )
        return self

    @property
    def uses_chat_template(self) -> bool:
        """Whether the model's chat template is applied."""
        return self.chat_template or self.messages is not None


FILTER_FIELDS = ("top_k", "top_p", "min_p")
SAMPLING_FIELDS = ("temperature", *FILTER_FIELDS, "repetition_penalty")


class ModelSettings(Settings):
    """Which model, and how it is loaded."""

    path: str = Field(description="Hugging Face hub id, or a folder.")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub model; recorded as a commit."
    )
    quantization: QuantizationSettings = Field(
        default=QuantizationSettings(method="none"),
        description="Quantization while loading: none, int8, nf4 or fp4 (bitsandbytes), "
        "torchao-int8, torchao-int4 or torchao-fp8; a block for its details. A model that is "
        "stored quantized needs none.",
    )
    gguf_file: str | None = Field(
        default=None,
        description="Name of a GGUF file in the folder or hub repository; it is unpacked to "
        "'dtype' while loading.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of the weights; auto is what the checkpoint holds, and float32 for GGUF.",
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        default="none",
        description="Where weights go that the GPUs have no room for; slow. cpu: into the "
        "machine's memory; disk: there, and what does not fit is read from the model's files at "
        "every step. For weights that are neither quantized nor under an adapter.",
    )
    adapter: AdapterSettings | None = Field(
        default=None,
        description="LoRA adapter on top of the model: a folder or hub id; a block merges it, or "
        "names several for a column to choose from.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the model; a hub model then needs "
        "'revision' to be a full commit.",
    )
    allow_pickle: bool = Field(
        default=False, description="Load weights that are not safetensors (pickle can run code)."
    )
    self_check: bool = Field(
        default=True,
        description="Try before the first row whether padding and batches change the model's "
        "answers, and find batches in which they do not.",
    )

    @model_validator(mode="after")
    def _plain_if_offloaded(self) -> ModelSettings:
        rivals = {
            "quantization": self.quantization.method != "none",
            "adapter": self.adapter is not None,
            "gguf_file": self.gguf_file is not None,
        }
        for name, is_set in rivals.items():
            if is_set and self.offload != "none":
                wish = f"has 'offload: {self.offload}', which goes only without '{name}'"
                raise ValueError(f"{wish}: leave one of them out")
        return self


class GenerationSettings(Settings):
    """How completions are generated; what is left out comes from the model's generation_config."""

    max_new_tokens: Annotated[int, Field(ge=1)] = Field(
        default=256, description="Most tokens of a completion."
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), strict=False, description="Strings that end a completion and are cut off."
    )
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), strict=False, description="Tokens that end a completion and are cut off."
    )
    include_stop: bool = Field(
        default=False,
        description="Leave the stop string, or the stop token's text, in the completion; special "
        "tokens have no text, and the model's own end is no stop string.",
    )
    min_new_tokens: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Tokens before which neither an end-of-sequence or stop token is generated "
        "nor a stop string counts.",
    )
    ignore_eos: bool = Field(
        default=False,
        description="Generate on past end-of-sequence tokens, for benchmarks and odd models.",
    )
    temperature: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="0 is greedy."
    )
    top_k: Annotated[int, Field(ge=0)] | None = Field(default=None, description="0 is off.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, description="1 is off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="0 is off.")
    repetition_penalty: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="1 is off."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="With temperature > 0, the same seed gives the same samples."
    )
    num_samples: Annotated[int, Field(ge=1)] = Field(default=1, description="Completions per row.")

    @model_validator(mode="after")
    def _minimum_below_maximum(self) -> GenerationSettings:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("'min_new_tokens' needs to be at most 'max_new_tokens'")
        return self

    def resolve(self, defaults: Mapping[str, object]) -> Sampling:
        """Fills in what the job leaves out, as transformers' `generate` would.

        A model's own temperature, top_k, top_p and min_p count only if it asks for sampling; its
        repetition penalty always. Where there is sampling and neither says otherwise, top_k is
        50, transformers' default.

        Args:
            defaults: what the model's `generation_config.json` says.

        Raises:
            JobFileError: top_k, top_p or min_p are set, and nothing asks for sampling.
            ModelError: a value of `defaults` is out of its range.
        """
        model = self._checked(defaults)
        penalty = _first(self.repetition_penalty, model.repetition_penalty, 1.0)
        if not defaults.get("do_sample"):
            model = GenerationSettings(temperature=0.0)
        temperature = _first(self.temperature, model.temperature, 1.0)
        greedy = Sampling(
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop=self.include_stop,
            min_new_tokens=self.min_new_tokens,
            ignore_eos=self.ignore_eos,
            repetition_penalty=penalty,
        )
        if temperature == 0:
            self._refuse_idle_filters()
            return greedy
        return replace(
            greedy,
            temperature=temperature,
            top_k=_first(self.top_k, model.top_k, 50),
            top_p=_first(self.top_p, model.top_p, 1.0),
            min_p=_first(self.min_p, model.min_p, 0.0),
        )

    @staticmethod
    def _checked(defaults: Mapping[str, object]) -> GenerationSettings:
        values = {name: defaults.get(name) for name in SAMPLING_FIELDS}
        try:
            return GenerationSettings.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(
                f"The model's generation_config.json has {first['loc'][0]}: {first['input']!r} "
                f"({first['msg']}): correct it there."
            ) from error

    def _refuse_idle_filters(self) -> None:
        idle = [name for name in FILTER_FIELDS if getattr(self, name) is not None]
        if idle and self.temperature is None:
            raise JobFileError(
                f"generation.{idle[0]} is set, but this model is greedy by default: set "
                f"generation.temperature above 0 to sample, or leave {idle[0]} out."
            )


class EngineSettings(Settings):
    """How the model is driven; changes the speed and not the answers."""

    kind: Literal["auto", "continuous", "static"] = Field(
        default="auto",
        description="continuous: a row that ends leaves its slot to the next prompt; static: "
        "left-padded generate on batches sorted by length; auto: continuous, unless the model's "
        "cache does not allow it.",
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=128, description="Rows generated at a time by one worker: its slots."
    )
    cache_bytes: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Memory of one worker for keys and values; left out, what a GPU has left "
        "beside the weights, or 2 GiB on CPU.",
    )


def _first(job: Value | None, model: Value | None, default: Value) -> Value:
    """The first of the three that is set."""
    if job is not None:
        return job
    return default if model is None else model

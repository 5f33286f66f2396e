"""`model.quantization`: a word for the usual, a block for the details.

The options of a block have the names that the method's own configuration class gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_serializer, model_validator

from pipeline.block import WordOrBlock

Quantization = Literal["none", "int8", "nf4", "fp4", "torchao-int8", "torchao-int4", "torchao-fp8"]
Dtype = Literal["float32", "bfloat16", "float16"]

FOUR_BIT_OPTIONS = (
    "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant",
    "llm_int8_skip_modules",
)
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "int8": ("llm_int8_threshold", "llm_int8_skip_modules"),
    "nf4": FOUR_BIT_OPTIONS,
    "fp4": FOUR_BIT_OPTIONS,
    "torchao-int8": ("modules_to_not_convert", "group_size"),
    "torchao-int4": ("modules_to_not_convert", "group_size"),
    "torchao-fp8": ("modules_to_not_convert",),
}
"""What each method may be told."""


class QuantizationSettings(WordOrBlock, word="method"):
    """Quantization while loading: a method, and options where its library's own do not do."""

    method: Quantization = Field(description="As the word alone.")
    bnb_4bit_compute_dtype: Dtype | None = Field(
        default=None,
        description="nf4, fp4: type of the products; left out, bfloat16 on a GPU that has it and "
        "the model's own type on CPU.",
    )
    bnb_4bit_use_double_quant: bool | None = Field(
        default=None, description="nf4, fp4: quantize the scales too."
    )
    llm_int8_threshold: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="int8: activations above it are multiplied unquantized."
    )
    llm_int8_skip_modules: tuple[str, ...] | None = Field(
        default=None,
        strict=False,
        description="int8, nf4, fp4: layers that stay unquantized; left out, the output layer.",
    )
    modules_to_not_convert: tuple[str, ...] | None = Field(
        default=None, strict=False, description="torchao: layers that stay unquantized."
    )
    group_size: Literal[32, 64, 128, 256] | None = Field(
        default=None,
        description="torchao-int8, torchao-int4: weights that share a scale; left out, a row of "
        "them, and 128.",
    )

    @model_validator(mode="after")
    def _only_what_the_method_knows(self) -> QuantizationSettings:
        unknown = set(self.options) - set(OPTIONS[self.method])
        if unknown:
            known = ", ".join(OPTIONS[self.method]) or "no options"
            raise ValueError(f"has '{min(unknown)}', but {self.method} knows {known}: leave it out")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set, by name; lists as the libraries want them."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "method"}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }

    @model_serializer
    def _shortest(self) -> dict[str, JsonValue] | str:
        """A block without options is its word."""
        return {"method": self.method, **self.options} if self.options else self.method

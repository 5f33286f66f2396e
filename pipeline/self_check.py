"""Whether a loaded model gives a row in a batch the answer that it gives it alone.

Every batch of unlike prompts rests on that, and not every model keeps to it: some ignore the
attention mask, or count positions from the padding's first column, and kernels have been seen to
give what is not a number for rows that are padded. So it is tried before the first row. What goes
wrong is tried with another attention implementation, then in batches that ask less of a model;
if nothing helps, the model is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline.attention import NAME as IN_BANDS
from pipeline.bands import Band
from pipeline.cache_support import unsupported
from pipeline.errors import ModelError, ResourceError, describe
from pipeline.forward import Forward
from pipeline.model import Model
from pipeline.padding import pad_left
from pipeline.probes import NUM_STEPS, difference, difference_problem, probes_for, tolerance
from pipeline.room import is_out_of_memory
from pipeline.settings import EngineSettings
from pipeline.slots import SlotCache

logger = logging.getLogger(__name__)

OTHER_ATTENTION = ("sdpa", "eager")
"""What is tried in place of an implementation that goes wrong; eager is the plainest there is."""


class Batches(StrEnum):
    """What a model's rows may have to do with one another, from much to little."""

    SLOTS = "slots"
    """Rows of any lengths that come and go: the continuous engine."""
    PADDED = "padded"
    """Rows of any lengths, padded on the left: the static engine."""
    EQUAL_LENGTHS = "equal lengths"
    """Rows of one length only."""


_NAMES = {
    Batches.SLOTS: ("a batch in slots", "running in slots"),
    Batches.PADDED: ("a padded batch", "left padding"),
    Batches.EQUAL_LENGTHS: ("a batch of one length", "another row of the same length"),
}
"""What may fail, and what may change logits."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What the probes have shown.

    Attributes:
        attention: implementation with which they came out right.
        batches: in which they did.
        difference: of the logits there, at most, from those of a row alone, as a share of their
            range.
        tolerance: what it may be.
        rejected: what went wrong before, a clause each.
    """

    attention: str
    batches: Batches
    difference: float
    tolerance: float
    seconds: float
    rejected: tuple[str, ...] = ()

    def figures(self) -> dict[str, Any]:
        """All of it in plain words and numbers, which can be read without importing this."""
        return {**asdict(self), "batches": self.batches.value}


def self_check(model: Model, settings: EngineSettings) -> SelfCheck:
    """Finds the batches in which padding and neighbours change no answer.

    The model is left with the attention implementation that was found.

    Raises:
        ModelError: there are none.
        ResourceError: the memory does not suffice for a short prompt.
        torch.AcceleratorError: the device has failed; nothing works in this process any more.
    """
    started = time.perf_counter()
    fits_slots = settings.kind != "static" and unsupported(model.model) is None
    rejected: list[str] = []
    for batches in list(Batches)[0 if fits_slots else 1 :]:
        for attention in _attentions(model):
            try:
                found = _difference(model, batches, settings.batch_size)
            except _WrongError as wrong:
                rejected.append(f"with {attention} attention, {wrong}")
                continue
            seconds = time.perf_counter() - started
            check = SelfCheck(attention, batches, found, tolerance(model), seconds, tuple(rejected))
            _tell(check)
            return check
    reasons = "; ".join(dict.fromkeys(rejected))
    raise ModelError(
        f"this model answers otherwise in a batch than alone, whatever is tried: {reasons} "
        f"({tolerance(model):.1%} would be rounding). Run one row at a time with engine.batch_size "
        "1, load it otherwise (model.dtype, model.quantization), or set model.self_check to false."
    )


class _WrongError(Exception):
    """A clause that says what goes wrong."""


def _attentions(model: Model) -> Iterator[str]:
    """Sets one implementation after the other, the model's own first."""
    network: Any = model.model
    first = network.config._attn_implementation
    # Ours is for slots, and chosen again for those.
    first = "sdpa" if first == IN_BANDS else first
    others = OTHER_ATTENTION if network._can_set_attn_implementation() else ()
    for name in dict.fromkeys((first, *others)):
        with suppress(ValueError, ImportError):  # the architecture does not have it
            if name != network.config._attn_implementation:
                network.set_attn_implementation(name)
            yield name
    if first != network.config._attn_implementation:
        network.set_attn_implementation(first)


def _difference(model: Model, batches: Batches, batch_size: int) -> float:
    """Of logits in such batches, at most so big, from those of each row alone.

    Raises:
        _WrongError: it is more than rounding, or the model fails.
    """
    probes = probes_for(model)
    if batches is Batches.EQUAL_LENGTHS:
        length = len(probes[-2]) if len(probes) > 1 else 1
        probes = [row[:length] for row in probes if len(row) >= length][:batch_size]
    rows = [_Row(*pair) for pair in zip(probes, cycle(_adapters(model)), strict=False)]
    alone = torch.cat([_run("a prompt alone", _generated, model, [row]) for row in rows])
    what, by = _NAMES[batches]
    logits_of = _in_slots if batches is Batches.SLOTS else _generated
    share = difference(alone, _run(what, logits_of, model, rows))
    if problem := difference_problem(model, share, by):
        raise _WrongError(problem)
    return share


class _Row(NamedTuple):
    """A probe, and whose answer it is to be."""

    ids: list[int]
    adapter: str


def _adapters(model: Model) -> list[str]:
    """What rows may choose: the model itself, and adapters."""
    return ["", *model.chooser.keys] if model.chooser else [""]


def _run(
    what: str,
    logits_of: Callable[[Model, Sequence[_Row]], Tensor],
    model: Model,
    rows: Sequence[_Row],
) -> Tensor:
    """Logits that are numbers."""
    try:
        logits = logits_of(model, rows)
    except Exception as error:
        if is_out_of_memory(error):
            raise ResourceError(
                "the memory that the model leaves is too little for a short prompt: lower "
                "workers.count, or set model.quantization"
            ) from error
        if isinstance(error, torch.AcceleratorError):
            raise
        # Models raise anything.
        raise _WrongError(f"{what} fails in this model ({describe(error)})") from error
    if not bool(logits.isfinite().all()):
        raise _WrongError(f"{what} makes this model's output something that is not a number")
    return logits


def _in_slots(model: Model, rows: Sequence[_Row]) -> Tensor:
    """As `_generated`, as the continuous engine has it: prefilled, and then decoded in slots."""
    forward = Forward(model)
    adapters = [row.adapter for row in rows]
    with torch.no_grad():
        prefilled, logits = forward.prefill([row.ids for row in rows], adapters=adapters)
        steps = [logits.float()]
        cache = SlotCache(forward.num_layers, len(rows), prefilled.window.length + NUM_STEPS)
        cache.append(prefilled, range(len(rows)))
        if forward.has_bands and len(rows) > 1:
            # So short, rows would not be cut into bands.
            num_hidden = prefilled.window.length - len(rows[1].ids)
            cache.window.bands = [Band(0, 1, 0), Band(1, len(rows), num_hidden)]
        last = torch.full((len(rows), 1), _following(model), device=model.device)
        steps += [forward(last, cache, adapters).float() for _ in range(NUM_STEPS - 1)]
    return torch.stack(steps, dim=1)


def _generated(model: Model, rows: Sequence[_Row]) -> Tensor:
    """Logits after each row, and after one more token: (rows, steps, vocabulary) float32."""
    ids = [row.ids for row in rows]
    input_ids, attention_mask = pad_left(ids, model.pad_id, model.device)
    recorder = _Recorder(_following(model))
    model.caller.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=NUM_STEPS, do_sample=False, pad_token_id=model.pad_id
        ),
        logits_processor=LogitsProcessorList([recorder]),
        **model.adapter_options([row.adapter for row in rows]),
    )
    return torch.stack(recorder.steps, dim=1)


def _following(model: Model) -> int:
    """The token after each probe."""
    return probes_for(model)[0][0]


class _Recorder(LogitsProcessor):
    """Keeps the logits of each step, and has `generate` go on with the same token in every row.

    With the most likely one, rounding could send a row another way.
    """

    def __init__(self, token: int) -> None:
        self.steps: list[Tensor] = []
        self._token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float())
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, min(self._token, scores.shape[-1] - 1)] = 0.0
        return chosen


def _tell(check: SelfCheck) -> None:
    for clause in check.rejected:
        logger.warning("self-check: %s", clause)
    level = logging.WARNING if check.rejected else logging.INFO
    logger.log(
        level,
        "self-check: batches of the kind '%s' with %s attention are within %.2g of the range of a "
        "prompt's logits alone (%.2g allowed); %.1f s",
        check.batches,
        check.attention,
        check.difference,
        check.tolerance,
        check.seconds,
    )

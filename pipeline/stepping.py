"""How decode steps are launched and read, tried out on the loaded model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.cuda_graph import CudaGraphs
from pipeline.decoder import Decoder, MakeCapture
from pipeline.errors import describe
from pipeline.forward import Forward
from pipeline.model import Model
from pipeline.probes import difference, difference_problem, probes_for
from pipeline.slots import SlotCache

logger = logging.getLogger(__name__)

NUM_STEPS = 2
"""One that is recorded, and one that is only replayed, a column further."""


@dataclass(frozen=True)
class Stepping:
    """What a GPU needs to be kept busy; on a CPU, a step is called and its tokens are read.

    Attributes:
        make_capture: makes steps ones that are recorded and replayed; None: the model is called.
        reads_behind: a step's tokens are looked at when the next one has been launched.
    """

    make_capture: MakeCapture | None = None
    reads_behind: bool = False


def stepping_for(model: Model) -> Stepping:
    """What suits the model's device. On a GPU, that recording works is tried."""
    if model.device.type != "cuda":
        return Stepping()
    stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
    make_capture = partial(CudaGraphs, stream)
    can_replay = replays_right(model, make_capture)
    torch.cuda.empty_cache()  # what the trial took is wanted for keys and values
    if not can_replay:
        return Stepping(reads_behind=True)
    logger.info("decode steps are replayed as CUDA graphs")
    return Stepping(make_capture, reads_behind=True)


def replays_right(model: Model, make_capture: MakeCapture) -> bool:
    """Whether recorded steps give the same logits; the log says why not."""
    if {parameter.device for parameter in model.model.parameters()} != {model.device}:
        logger.info("decode steps run without CUDA graphs: the model is on several devices")
        return False
    if model.chooser is not None:
        logger.info("decode steps run without CUDA graphs: rows have adapters of their own")
        return False
    decoder = Decoder(Forward(model), make_capture)
    try:
        problem = _replay_problem(model, decoder)
    except Exception as error:  # noqa: BLE001 - models raise anything; each row will tell
        problem = f"the trial of them fails ({describe(error)})"
    if problem and decoder.replays:
        logger.warning("decode steps run without CUDA graphs, since %s", problem)
    return problem is None and decoder.replays


def _replay_problem(model: Model, decoder: Decoder) -> str | None:
    with torch.no_grad():
        replayed = _logits(model, decoder)
        called = _logits(model, Decoder(decoder.forward))
    share = difference(called, replayed)
    return difference_problem(model, share, "replaying decode steps")


def _logits(model: Model, decoder: Decoder) -> Tensor:
    """Of decode steps of a few rows and an empty slot: (rows, steps, vocabulary) float32."""
    rows = probes_for(model)
    prefilled, _ = decoder.forward.prefill(rows)
    length = prefilled.window.length
    cache = SlotCache(decoder.forward.num_layers, len(rows) + 1, length + NUM_STEPS)
    cache.append(prefilled, range(len(rows)))
    following = torch.full((len(rows),), rows[0][0], device=model.device)
    steps = [
        # A copy in any case: the next step writes to the same place.
        decoder(following, cache).logits.to(torch.float32, copy=True)
        for _ in range(NUM_STEPS)
    ]
    return torch.stack(steps, dim=1)

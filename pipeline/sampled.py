"""A sample of a job's rows through an engine, with the tokens that each row got."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.adapter_choice import AdapterChoice
from pipeline.bench_specs import SampleSpec
from pipeline.engine import Engine, build_engine
from pipeline.errors import RowError
from pipeline.measured import Answer, Sampled
from pipeline.model import Model
from pipeline.peak_memory import peak_bytes, reset_peak
from pipeline.prompts import PromptRenderer
from pipeline.reader import ShardReader, plain_rows
from pipeline.records import Completion, Request, RequestId
from pipeline.sampling import random_key
from pipeline.self_check import self_check
from pipeline.stopping import Generated

WARM_ROWS = 4
WARM_TOKENS = 4
TELL_SECONDS = 2.0


class _Heard:
    """The tokens of the rows that have ended, and a word now and then how many those are.

    Greedy requests of one prompt are generated once, under the name of the first.
    """

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._told = time.monotonic()
        self._by_id: dict[RequestId, tuple[int, ...]] = {}
        self._by_prompt: dict[tuple[tuple[int, ...], str], tuple[int, ...]] = {}

    def on_token(self, generated: Generated) -> None:
        """Listens to an engine."""
        if generated.completion is not None:
            request, ids = generated.request, tuple(generated.ids)
            self._by_id[request.id] = ids
            self._by_prompt[request.prompt_ids, request.adapter] = ids
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self._tell(len(self._by_id))

    def ids_of(self, request: Request) -> tuple[int, ...]:
        """None for a row that failed before its first."""
        shared = self._by_prompt.get((request.prompt_ids, request.adapter), ())
        return self._by_id.get(request.id, shared)

    def forget(self) -> None:
        """Takes what was heard for nothing."""
        self._by_id.clear()
        self._by_prompt.clear()


def run_sample(model: Model, spec: SampleSpec, tell: Callable[[int], None]) -> Sampled:
    """Answers the rows, the first sample of each.

    Args:
        tell: is told now and then how many rows have their answer.
    """
    asked = _ask(model, spec)
    requests = [request for request in asked.values() if isinstance(request, Request)]
    heard = _Heard(tell)
    check = self_check(model, spec.engine) if spec.model.self_check else None
    engine = build_engine(model, spec.engine, heard.on_token, check=check)
    short = replace(spec.sampling, max_new_tokens=WARM_TOKENS, min_new_tokens=0)
    _complete(engine, [replace(request, sampling=short) for request in requests[:WARM_ROWS]])
    heard.forget()
    reset_peak(model.device)
    before, started = engine.metrics, time.perf_counter()
    done = _complete(engine, requests)
    seconds, after = time.perf_counter() - started, engine.metrics
    num_prefilled = after.num_prefilled_tokens - before.num_prefilled_tokens
    num_decoded = after.num_live_slot_steps - before.num_live_slot_steps
    return Sampled(
        answers=tuple(_answer(model, *pair, done, heard) for pair in asked.items()),
        num_prompt_tokens=sum(completion.num_prompt_tokens for completion in done.values()),
        num_completion_tokens=sum(completion.num_completion_tokens for completion in done.values()),
        seconds=seconds,
        prefill_tokens_per_second=_rate(
            num_prefilled, after.prefill_seconds - before.prefill_seconds
        ),
        decode_tokens_per_second=_rate(num_decoded, after.decode_seconds - before.decode_seconds),
        peak_bytes=peak_bytes(model.device),
    )


def _ask(model: Model, spec: SampleSpec) -> dict[str, Request | str]:
    """By row id, its request, or why there is none."""
    renderer = PromptRenderer(
        spec.prompt,
        model.tokenizer,
        now=spec.started,
        max_tokens=model.prompt_room(spec.sampling.max_new_tokens),
    )
    choice = AdapterChoice.of(spec.model)
    names = tuple(dict.fromkeys((*renderer.columns, *choice.columns)))
    reader = ShardReader(names)
    values = [row for shard in spec.rows for row in plain_rows(reader.read(shard), names)]
    reader.close()
    ids = renderer.encode(values)
    return {
        shard.row_id(0): _asked(spec, number, values[number], ids[number], choice)
        for number, shard in enumerate(spec.rows)
    }


def _asked(
    spec: SampleSpec,
    number: int,
    row: dict[str, object] | RowError,
    ids: list[int] | RowError,
    choice: AdapterChoice,
) -> Request | str:
    try:
        if isinstance(row, RowError):
            raise row
        if isinstance(ids, RowError):
            raise ids
        adapter = choice.made_by(row)
    except RowError as error:
        return str(error)
    key = random_key(spec.seed, spec.rows[number].row_id(0), 0)
    return Request(RequestId(0, number, 0), tuple(ids), spec.sampling, key, adapter)


def _complete(engine: Engine, requests: Sequence[Request]) -> dict[RequestId, Completion]:
    engine.add(requests)
    done: dict[RequestId, Completion] = {}
    while engine.num_waiting + engine.num_running:
        done |= {completion.id: completion for completion in engine.step()}
    return done


def _rate(num_tokens: int, seconds: float) -> float | None:
    return num_tokens / seconds if seconds else None


def _answer(
    model: Model,
    row_id: str,
    asked: Request | str,
    done: dict[RequestId, Completion],
    heard: _Heard,
) -> Answer:
    if isinstance(asked, str):
        return Answer(row_id, None, None, error=asked)
    completion = done[asked.id]
    prompt = str(model.tokenizer.decode(list(asked.prompt_ids)))
    return Answer(row_id, prompt, completion.text, heard.ids_of(asked), completion.error)

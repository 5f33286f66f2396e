"""`shardmill try`: the first rows of a job in this process, shown as they grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jobs.config import JobConfig
from jobs.prepare import PreparedJob, prepared_for_now
from pipeline.adapter_choice import AdapterChoice
from pipeline.engine import build_engine
from pipeline.errors import RowError
from pipeline.model import Model, load_model
from pipeline.prompts import PromptRenderer
from pipeline.reader import ShardReader, plain_rows
from pipeline.records import Completion, FinishReason, Request, RequestId, Shard
from pipeline.sampling import random_key
from pipeline.self_check import self_check
from pipeline.stopping import UNDECODED, Generated


@dataclass(frozen=True, slots=True)
class TriedRow:
    """One row of `try`."""

    row_id: str
    prompt: str | None
    completion: str | None
    finish_reason: str
    stop_reason: str | None
    num_prompt_tokens: int
    num_completion_tokens: int
    error: str | None


def try_job(job: JobConfig, num_rows: int, show: Callable[[str], None]) -> list[TriedRow]:
    """Generates completions for the first rows, one after the other.

    Args:
        show: takes pieces of text as they come: prompt, completion, how it ended.

    Raises:
        ShardmillError: as `run` would.
    """
    limit = min(num_rows, job.input.limit or num_rows)
    first = job.model_copy(update={"input": job.input.model_copy(update={"limit": limit})})
    with prepared_for_now(first) as prepared:
        return _Trial(prepared, show).run()


class _Trial:
    """Rows through renderer and engine, one at a time."""

    def __init__(self, prepared: PreparedJob, show: Callable[[str], None]) -> None:
        self._prepared = prepared
        self._show = show
        self._model = load_model(prepared.checkpoint, prepared.job.model)
        self._renderer = PromptRenderer(
            prepared.job.prompt,
            self._model.tokenizer,
            max_tokens=self._model.prompt_room(prepared.sampling.max_new_tokens),
        )
        self._choice = AdapterChoice.of(prepared.job.model)
        self._stream = _Stream(self._model, show)
        settings = prepared.job.engine
        check = self_check(self._model, settings) if prepared.job.model.self_check else None
        self._engine = build_engine(self._model, settings, self._stream.on_token, check=check)

    def run(self) -> list[TriedRow]:
        self._show(f"generation: {self._prepared.describe_generation()}\n")
        names = tuple(dict.fromkeys((*self._renderer.columns, *self._choice.columns)))
        reader = ShardReader(names)
        tried: list[TriedRow] = []
        for file in self._prepared.inputs.files:
            shard = Shard(0, file.path, file.name, 0, file.num_rows)
            rows = plain_rows(reader.read(shard), names)
            tried += [self._try_row(shard, row, values) for row, values in enumerate(rows)]
        return tried

    def _try_row(self, shard: Shard, row: int, values: dict[str, object] | RowError) -> TriedRow:
        self._show(f"\n--- {shard.row_id(row)}: prompt\n")
        identity = RequestId(0, row, 0)
        try:
            if isinstance(values, RowError):
                raise values
            prompt_ids = self._renderer.token_ids(self._renderer.render(values))
            adapter = self._choice.made_by(values)
        except RowError as error:
            return self._done(
                shard, None, Completion(identity, None, FinishReason.ERROR, error=str(error))
            )
        # Decoded again from the tokens: what the model really gets.
        prompt = str(self._model.tokenizer.decode(prompt_ids))
        self._show(f"{prompt}\n--- completion\n")
        key = random_key(self._prepared.job.generation.seed, shard.row_id(row), 0)
        sampling = self._prepared.sampling
        self._engine.add([Request(identity, tuple(prompt_ids), sampling, key, adapter)])
        finished: list[Completion] = []
        while not finished:
            finished = self._engine.step()
        return self._done(shard, prompt, finished[0])

    def _done(self, shard: Shard, prompt: str | None, completion: Completion) -> TriedRow:
        self._stream.finish(completion)
        how = completion.error or completion.finish_reason.value
        if completion.stop_reason is not None:
            how += f" at {completion.stop_reason!r}"
        self._show(
            f"\n--- {how}: {completion.num_prompt_tokens} prompt tokens, "
            f"{completion.num_completion_tokens} generated\n"
        )
        return TriedRow(
            row_id=shard.row_id(completion.id.row),
            prompt=prompt,
            completion=completion.text,
            finish_reason=completion.finish_reason.value,
            stop_reason=completion.stop_reason,
            num_prompt_tokens=completion.num_prompt_tokens,
            num_completion_tokens=completion.num_completion_tokens,
            error=completion.error,
        )


class _Stream:
    """Shows a completion while it grows, holding back what may yet become a stop string."""

    def __init__(self, model: Model, show: Callable[[str], None]) -> None:
        self._decode = model.vocabulary.decode
        self._show = show
        self._num_shown = 0

    def on_token(self, generated: Generated) -> None:
        """Shows what is certain by now."""
        text = self._decode(generated.ids).rstrip(UNDECODED)
        num_held = max((len(stop) for stop in generated.request.sampling.stop), default=0)
        if generated.completion is None:
            self._show_until(text, len(text) - num_held)

    def finish(self, completion: Completion) -> None:
        """Shows the rest."""
        text = completion.text or ""
        self._show_until(text, len(text))
        self._num_shown = 0

    def _show_until(self, text: str, end: int) -> None:
        if end > self._num_shown:
            self._show(text[self._num_shown : end])
            self._num_shown = end

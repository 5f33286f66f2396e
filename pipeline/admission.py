"""Whether a request can be done at all. Standard library only."""

from __future__ import annotations

from pipeline.records import Completion, FinishReason, Request


def refusal(request: Request, context_length: int | None, num_embeddings: int) -> str | None:
    """Why a model cannot do a request, as `kind: message`; None if it can.

    Args:
        request: what is asked for.
        context_length: most tokens of prompt and completion together; None is no limit.
        num_embeddings: token ids must be below this; on a GPU a larger one ends the process.
    """
    num_prompt_tokens = len(request.prompt_ids)
    max_new_tokens = request.sampling.max_new_tokens
    if num_prompt_tokens == 0:
        return "empty_prompt: the prompt has no tokens"
    if context_length is not None and num_prompt_tokens + max_new_tokens > context_length:
        return (
            f"overlong: {num_prompt_tokens} prompt tokens and generation.max_new_tokens "
            f"{max_new_tokens} are more than the model's {context_length}"
        )
    if max(request.prompt_ids) >= num_embeddings:
        return (
            f"unknown_token: token {max(request.prompt_ids)} is in the tokenizer, but the model "
            f"has only {num_embeddings}"
        )
    return None


def failed(request: Request, error: str) -> Completion:
    """The completion of a request that could not be done; `error` is `kind: message`."""
    return Completion(
        id=request.id,
        text=None,
        finish_reason=FinishReason.ERROR,
        num_prompt_tokens=len(request.prompt_ids),
        error=error,
    )

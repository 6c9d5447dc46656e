"""What a request for embeddings says, checked. Pure; may run in any thread."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.api.errors import bad_request
from cluster.api.prompt import Limits, check_ids, is_id, refuse_long_text
from cluster.api.schema import Priority, RequestBody
from cluster.tokenizer import Tokenizer
from planner.embedding_files import EmbeddingModel

MAX_INPUTS = 2048  # OpenAI's


class EmbeddingsBody(RequestBody):
    """POST /v1/embeddings."""

    input: Any = None  # read by `read_inputs`
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1)] = None
    priority: Priority = None


def read_inputs(given: Any, tokenizer: Tokenizer, model: EmbeddingModel, limits: Limits) -> list[list[int]]:
    """`input` as a text, a list of texts, a list of ids, or a list of those; raises ApiError.

    A text has the special tokens that its tokenizer adds; ids are taken as they are.
    """
    if given is None:
        raise bad_request("input is missing.", "input", "missing_parameter")
    if isinstance(given, str) or (isinstance(given, list) and given and is_id(given[0])):
        given = [given]
    if not isinstance(given, list):
        raise _wrong()
    if not given:
        raise _empty()
    if len(given) > MAX_INPUTS:
        raise bad_request(
            f"input has {len(given)} elements, and {MAX_INPUTS} are allowed: send several requests.", "input"
        )
    return [_read(item, tokenizer, model, limits) for item in given]


def _read(item: Any, tokenizer: Tokenizer, model: EmbeddingModel, limits: Limits) -> list[int]:
    if isinstance(item, str):
        if not item:
            raise _empty()
        refuse_long_text(len(item), tokenizer, limits, "input")
        text = model.prefix + item
        tokens = tokenizer.encode(text.lower() if model.is_lowered else text)
    elif isinstance(item, list):
        tokens = item
    else:
        raise _wrong()
    if not tokens:
        raise _empty()
    most = min(limits.context, model.max_tokens or limits.context)
    if limits.context and len(tokens) > most:
        raise bad_request(
            f"This model reads at most {most} tokens of an input, but one has {len(tokens)}. Please shorten "
            "it, or send it in parts.",
            "input",
            "context_length_exceeded",
        )
    return check_ids(tokens, limits, "input") if isinstance(item, list) else tokens


def _wrong() -> Exception:
    return bad_request("input must be a text, a list of texts, or token ids.", "input", "invalid_value")


def _empty() -> Exception:
    return bad_request("input is empty.", "input", "empty_input")

"""What a request body may hold, as pydantic models; every refusal names the field. Pure.

The bodies of other dialects are in files of their own (`messages_body`, `responses_body`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.api.errors import bad_request

MAX_TOP_LOGPROBS = 20
MAX_N = 64
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
ROLES = ("system", "developer", "user", "assistant", "tool")

# They cannot change a token, whatever they say.
_IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "cache_control", "moderation"),
    *("parallel_tool_calls", "include_reasoning"),
)
_NULL_ONLY = (
    *("audio", "prediction", "web_search_options", "reasoning_effort", "truncate_prompt_tokens"),
    *(
        "prompt_logprobs",
        "guided_grammar",
        "allowed_token_ids",
        "documents",
        "chat_template",
        "mm_processor_kwargs",
    ),
    *("kv_transfer_params", "adapters", "draft_model"),
)
# Accepted with the values that mean "off" (null always does); anything else is refused by name.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "logits_processors": ([],),
    "bad_words": ([],),
    "xtc_probability": (0.0,),
    "typical_p": (1.0,),
    "num_draft_tokens": (0,),
    **dict.fromkeys(_NULL_ONLY, ()),
}

Penalty = Annotated[float | None, Field(ge=-2, le=2)]
Priority = Annotated[int | None, Field(ge=-(2**31), lt=2**31)]  # vLLM's: lower ones start first


class StreamOptions(BaseModel):
    """OpenAI's stream_options."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers; no token depends on it


class RequestBody(BaseModel):
    """A body, and what is accepted besides its fields. A null means: not given."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    ignored: ClassVar[tuple[str, ...]] = _IGNORED
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _NEUTRAL

    model: str | None = None


class GenerateBody(RequestBody):
    """The fields that both endpoints share."""

    max_stops: ClassVar[int] = MAX_STOPS

    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    min_tokens: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    repetition_context_size: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**64)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_N)] = None
    priority: Priority = None
    stop: Any = None  # a string or a list: read by `stops`
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    response_format: Any = None  # this and the next four: read by cluster.api.structure
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; raises ApiError."""
        if self.stop is None:
            return ()
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise bad_request("stop must be a string or a list of strings.", "stop")
        if len(stops) > self.max_stops:
            raise bad_request(f"stop holds {len(stops)} strings; {self.max_stops} are allowed.", "stop")
        if not all(stops):
            raise bad_request("stop holds an empty string.", "stop")
        if max(map(len, stops), default=0) > MAX_STOP_CHARS:
            raise bad_request(f"stop holds a string of more than {MAX_STOP_CHARS} characters.", "stop")
        return tuple(stops)


class CompletionBody(GenerateBody):
    """POST /v1/completions."""

    max_tokens: Annotated[int | None, Field(ge=0)] = None  # 0: the prompt is only scored
    prompt: Any = None  # read by cluster.api.prompt.read_prompts
    echo: bool | None = None
    best_of: int | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None


class ChatBody(GenerateBody):
    """POST /v1/chat/completions."""

    messages: Any = None  # read by cluster.api.chat_messages.read_messages
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Any = None  # with the next: read by cluster.api.tools.read_tools
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: Annotated[str | None, Field(min_length=1, max_length=64)] = None
    include_reasoning: bool | None = None


Body = TypeVar("Body", bound=RequestBody)


def parse_body(body: bytes, kind: type[Body]) -> Body:
    """The request in `body`; raises ApiError 400 naming the first wrong field."""
    try:
        content = json.loads(body.decode("utf-8-sig"))
        if b"\\u" in body:
            json.dumps(
                content, ensure_ascii=False
            ).encode()  # JSON can spell lone surrogates; they are no text
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise bad_request("The body must be a JSON object.", code="invalid_json")
    return read_body(content, kind)


def read_body(content: Mapping[str, Any], kind: type[Body]) -> Body:
    """The same of a body that is an object already."""
    fields = _without_neutral(content, kind)
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error) from None
    if isinstance(request, GenerateBody):
        _check_together(request)
    return request


def _without_neutral(content: Mapping[str, Any], kind: type[RequestBody]) -> dict[str, Any]:
    kept = {}
    for name, value in content.items():
        if name in kind.model_fields:
            kept[name] = value
        elif name in kind.neutral:
            if value is not None and not any(_is_same(value, neutral) for neutral in kind.neutral[name]):
                raise bad_request(
                    f"{name} is not supported with the value {_show(value)}.",
                    name,
                    "unsupported_parameter",
                )
        elif name not in kind.ignored:
            near = difflib.get_close_matches(
                name, [*kind.model_fields, *kind.neutral, *kind.ignored], 1, 0.75
            )
            hint = f" Did you mean {near[0]}?" if near else ""
            raise bad_request(
                f"{_show(name)[1:-1]} is not a field of this request.{hint}", name, "unknown_parameter"
            )
    return kept


def _check_together(request: GenerateBody) -> None:
    """What one field says about another."""
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise bad_request("max_tokens and max_completion_tokens differ; send one of them.", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is only allowed when stream is true.", "stream_options")
    if isinstance(request, ChatBody):
        if request.top_logprobs and not request.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
        if request.continue_final_message and request.add_generation_prompt:
            raise bad_request(
                "continue_final_message and add_generation_prompt exclude each other.",
                "continue_final_message",
            )
    if isinstance(request, CompletionBody):
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise bad_request(
                "best_of is only supported when it equals n.", "best_of", "unsupported_parameter"
            )
        if request.max_tokens == 0 and not request.echo:
            raise bad_request("max_tokens: 0 is only allowed together with echo.", "max_tokens")


def _first_problem(error: ValidationError) -> Exception:
    problem = error.errors(include_url=False, include_input=False)[0]
    place = [part for part in problem["loc"] if part != "[key]"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if problem["type"] == "extra_forbidden":
        return bad_request(f"{name} is not a field of this request.", name, "unknown_parameter")
    reason = problem["msg"].removeprefix("Input ")
    return bad_request(f"{name}: the value {reason}.", name, "invalid_value")


def _is_same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

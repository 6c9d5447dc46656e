"""What a body of OpenAI's Responses API may hold (platform.openai.com/docs/api-reference/responses). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.api.errors import bad_request
from cluster.api.schema import MAX_TOP_LOGPROBS, Priority, RequestBody, StreamOptions

LOGPROBS = "message.output_text.logprobs"
# What a client may ask to be included; but for the first, no answer here has anything of the kind.
_INCLUDABLE = (
    LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)
# Each would make the answer depend on what a server keeps.
_STORED = ("previous_response_id", "conversation", "prompt")


class ReasoningConfig(BaseModel):
    """`reasoning`. A summary is never made: the reasoning comes as it is."""

    model_config = ConfigDict(strict=True, extra="forbid")

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextConfig(BaseModel):
    """`text`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(RequestBody):
    """POST /v1/responses, and /v1/responses/input_tokens, where what is about the answer is not looked at."""

    # They cannot change a token; max_tool_calls counts calls of OpenAI's own tools only.
    ignored: ClassVar[tuple[str, ...]] = (
        *("user", "store", "service_tier", "safety_identifier", "moderation"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "client_metadata"),
        "max_tool_calls",
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "truncation": ("disabled",),
    }

    input: Any = None  # read by cluster.api.responses_prompt, and the next two
    tools: Any = None
    tool_choice: Any = None
    instructions: str | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None  # where they are included
    metadata: dict[str, Any] | None = None  # sent back
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31)] = None  # this and the rest are vLLM's and ours
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**64)] = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: Priority = None

    @property
    def has_logprobs(self) -> bool:
        """Whether the answer's text comes with log-probabilities."""
        return LOGPROBS in (self.include or ())

    def check(self) -> None:
        """What pydantic does not say; raises ApiError."""
        for name in _STORED:
            if getattr(self, name) is not None:
                raise bad_request(
                    f"{name} is not supported: nothing is stored here; send the whole conversation in input.",
                    name,
                    "unsupported_parameter",
                )
        for i, name in enumerate(self.include or ()):
            if name not in _INCLUDABLE:
                place = f"include[{i}]"
                raise bad_request(f"{place}: {name[:60]!r} is not supported.", place, "unsupported_parameter")

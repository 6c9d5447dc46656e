"""What a body of Anthropic's Messages API may hold (docs.anthropic.com/en/api/messages). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.api.errors import bad_request
from cluster.api.schema import MAX_STOP_CHARS, ChatBody, Priority, RequestBody

MAX_STOP_SEQUENCES = 64
MIN_BUDGET_TOKENS = 1024

StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Thinking(BaseModel):
    """`thinking`. A budget is an aim and no limit there either; here the model alone decides."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int | None, Field(ge=MIN_BUDGET_TOKENS)] = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(BaseModel):
    """`output_config.format`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseModel):
    """`output_config`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ToolChoice(BaseModel):
    """`tool_choice`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesBody(RequestBody):
    """POST /v1/messages, and /v1/messages/count_tokens, where what is about the answer is not looked at."""

    # They cannot change a token: a cache is transparent, the rest is about the account.
    ignored: ClassVar[tuple[str, ...]] = (
        *("metadata", "service_tier", "cache_control", "user_profile_id", "workspace_id"),
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "container": (),
        "context_management": (
            {},
            {"edits": []},
            {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        ),
        "diagnostics": (),
        "inference_geo": ("global",),
        "mcp_servers": ([],),
        "speed": ("standard",),
    }

    thread: Any = None
    messages: Any = None  # read by cluster.api.messages_prompt, and the next two
    system: Any = None
    tools: Any = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    stop_sequences: Annotated[list[StopSequence] | None, Field(max_length=MAX_STOP_SEQUENCES)] = None
    stream: bool | None = None
    temperature: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**64)] = None  # this and the next are ours
    chat_template_kwargs: dict[str, Any] | None = None
    priority: Priority = None

    def check(self) -> None:
        """What pydantic does not say; raises ApiError."""
        if self.thread:
            raise bad_request(
                "thread is not supported: nothing is stored here; send the whole conversation in messages "
                "(thread=False).",
                "thread",
                "unsupported_parameter",
            )


class MessagesChat(ChatBody):
    """The chat that a MessagesBody is."""

    max_stops: ClassVar[int] = MAX_STOP_SEQUENCES

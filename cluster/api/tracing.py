"""POST /v1/cluster/trace: a trace of the ring for who reaches its API alone. Event loop, and one thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.api.errors import ApiError, bad_request, unavailable
from cluster.config import ClusterConfig
from cluster.errors import EXIT_UNREACHABLE, EXIT_USAGE, UserError
from cluster.tls import Credentials
from cluster.trace_client import Choices
from cluster.trace_run import MAX_TOKENS, Ask, prompts_for, trace_ring

MAX_PROMPT_TOKENS = 1 << 20


class TraceBody(BaseModel):
    """What may be asked; the names of cluster.trace_run."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tokens: int = Field(32, ge=1, le=MAX_TOKENS)
    prompt_tokens: int = Field(32, ge=1, le=MAX_PROMPT_TOKENS)
    layers_per_span: int = Field(0, ge=0, le=1024)
    is_warmed: bool = True
    is_forced: bool = False


class Tracer:
    """Traces the ring of this config, one request at a time."""

    def __init__(self, config: ClusterConfig, credentials: Credentials) -> None:
        self._config, self._credentials = config, credentials
        self._is_busy = False

    async def trace(self, raw: bytes) -> dict[str, Any]:
        """{"summary", "trace"}, as `macrame trace` has them. Raises ApiError.

        A caller that leaves ends it at the next token.
        """
        try:
            body = TraceBody.model_validate_json(raw)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"]))
            raise bad_request(f"{name or 'The body'}: {problem['msg']}.", name or None) from None
        if self._is_busy:
            raise ApiError(409, "A trace is being made already; ask again when it is done.", code="busy")
        self._is_busy = True
        left = threading.Event()
        work = asyncio.create_task(asyncio.to_thread(self._trace, body, left))
        work.add_done_callback(self._done)
        try:
            return await asyncio.shield(work)
        except UserError as error:
            if error.exit_code == EXIT_UNREACHABLE:
                raise unavailable(f"{error}.") from None
            if error.exit_code == EXIT_USAGE:
                raise bad_request(f"{error}.", "prompt_tokens", "context_length_exceeded") from None
            raise ApiError(409, f"{error}.", code="no_trace") from None
        finally:
            left.set()

    def _done(self, work: asyncio.Task[dict[str, Any]]) -> None:
        self._is_busy = False
        if not work.cancelled():
            work.exception()  # seen, also where the caller left

    def _trace(self, body: TraceBody, left: threading.Event) -> dict[str, Any]:
        config, credentials = self._config, self._credentials
        drawn = prompts_for(config, credentials, body.prompt_tokens, body.tokens)
        ask = Ask(drawn, body.tokens, body.is_warmed, body.is_forced, left)
        traced = trace_ring(config, credentials, ask, Choices(body.layers_per_span))
        return {"summary": traced.summary(), "trace": traced.file()}

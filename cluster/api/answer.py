"""Runs a request's choices at the head and writes them out, streamed or whole. Event loop only.

A stream's headers go out with the head's first reply, so that a failing start is a plain status; after
KEEP_ALIVE_S without one they go out with a comment, and a failure is an event.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from cluster.api.access import current_note
from cluster.api.choice import Choice, Delta, TextOptions
from cluster.api.errors import ApiError, internal
from cluster.api.head_client import Generation, HeadClient
from cluster.api.metrics import Metrics
from cluster.api.prompt import Prompt
from cluster.api.shape import AnswerOptions, Shape, Usage
from cluster.tokenizer import Tokenizer
from proto import head_pb2

logger = logging.getLogger(__name__)

T = TypeVar("T")
Run = Callable[[Choice, head_pb2.GenerateRequest], Coroutine[Any, Any, T]]

KEEP_ALIVE_S = 10.0
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: one prompt and one head request per choice, in the order of their indices."""

    prompts: list[Prompt]
    requests: list[head_pb2.GenerateRequest]
    num_prompt_tokens: int  # each prompt once, however many choices it has
    text: TextOptions
    options: AnswerOptions


class Answer:
    """The ASGI response to a Job. A stream that is silent for `keep_alive_s` gets a comment."""

    def __init__(
        self,
        job: Job,
        shape: Shape,
        tokenizer: Tokenizer,
        head: HeadClient,
        metrics: Metrics,
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self._job = job
        self._shape = shape
        self._head = head
        self._metrics = metrics
        self._choices = [
            Choice(index, prompt.tokens, job.text, tokenizer, len(prompt.echo))
            for index, prompt in enumerate(job.prompts)
        ]
        self._is_started = self._is_ended = self._has_opened = False
        self._lock = asyncio.Lock()  # several choices write into one stream
        self._num_cached = [0] * len(job.prompts)  # of each choice's prompt
        self._keep_alive_s = keep_alive_s
        self._began_at_s = self._written_at_s = time.monotonic()
        self._note = current_note.get()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or raises ApiError while nothing has been sent. A client that leaves ends the work."""
        work = asyncio.create_task(self._run(send))
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        tasks = {work, gone}
        if self._job.options.is_streamed:
            tasks.add(asyncio.create_task(self._keep_alive(send)))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._metrics.disconnects.inc(not work.done())
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self._count()
        if not work.cancelled():
            work.result()

    async def _run(self, send: Send) -> None:
        try:
            if self._job.options.is_streamed:
                await self._each(lambda choice, request: self._stream(choice, request, send))
                await self._write(send, self._shape.end(self._usage()), is_last=True)
            else:
                await self._write_whole(send, await self._each(self._collect))
        except ApiError as error:
            if not self._is_started:
                raise
            await self._write_error(send, error)
        except Exception:  # the HTTP border: after the first byte no handler above can answer
            if not self._is_started:
                raise
            logger.exception("a streamed request failed")
            await self._write_error(send, internal())

    async def _each(self, run: Run[T]) -> list[T]:
        """`run` for all choices at once; the first failure ends the others."""
        pairs = list(zip(self._choices, self._job.requests, strict=True))
        if len(pairs) == 1:
            return [await run(*pairs[0])]
        tasks = [asyncio.create_task(run(*pair)) for pair in pairs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _collect(self, choice: Choice, request: head_pb2.GenerateRequest) -> tuple[Delta, str]:
        texts: list[str] = []
        total = Delta()
        gaps, generation = self._metrics.gaps, self._head.generate(request)
        try:
            reply = await self._first(generation, choice)
            then_s = time.monotonic()
            while True:
                delta = choice.feed(reply)
                if delta is not None:
                    texts.append(delta.text)
                    if delta.parts is not None:
                        total.parts = total.parts or []
                        total.parts += delta.parts
                    total.text_tokens += delta.text_tokens
                    total.prompt += delta.prompt
                    total.prompt_offsets += delta.prompt_offsets
                    total.tokens += delta.tokens
                    total.offsets += delta.offsets
                if choice.finish_reason:
                    if not reply.finish_reason:
                        generation.enough()
                    total.text, total.stop_string = "".join(texts), choice.stop_string
                    return total, choice.finish_reason
                reply = await generation.read()
                then_s = gaps.add(then_s)
        finally:
            generation.close()

    async def _stream(self, choice: Choice, request: head_pb2.GenerateRequest, send: Send) -> None:
        shape, index = self._shape, choice.index
        gaps, generation = self._metrics.gaps, self._head.generate(request)
        try:
            reply = await self._first(generation, choice)
            then_s = time.monotonic()
            text = self._openings()
            while True:
                delta = choice.feed(reply)
                if delta is not None and (delta.text or delta.parts or delta.tokens or delta.prompt):
                    text += shape.delta(index, delta)
                if choice.finish_reason:
                    text += shape.closing(index, choice.finish_reason, choice.stop_string)
                if text or not self._is_started:
                    await self._write(send, text.encode())
                    text = ""
                if choice.finish_reason:
                    if not reply.finish_reason:
                        generation.enough()
                    return
                reply = await generation.read()
                then_s = gaps.add(then_s)
        finally:
            generation.close()

    def _openings(self) -> str:
        """Those of all choices, in their order, for the first of them that has something to say.

        OpenAI's client, which joins the choices of a stream, wants to hear of them so.
        """
        if self._has_opened:
            return ""
        self._has_opened = True
        return "".join(self._shape.opening(i, prompt) for i, prompt in enumerate(self._job.prompts))

    async def _first(self, generation: Generation, choice: Choice) -> head_pb2.GenerateReply:
        """The reply with the first token; `choice` hears what is said of the prompt before."""
        while not (reply := await generation.read()).tokens:
            choice.hear(reply)
        now_s, metrics = time.monotonic(), self._metrics
        self._num_cached[choice.index] = reply.cached_tokens
        metrics.first_token_s.observe(now_s - self._began_at_s)
        metrics.queue_s.observe(reply.queue_ms / 1e3)
        metrics.prefill_s.observe(reply.prefill_ms / 1e3)
        if self._note.first_token_s is None:
            self._note.first_token_s = now_s - self._note.began_s
        return reply

    def _usage(self) -> Usage:
        return Usage(
            self._job.num_prompt_tokens,
            sum(choice.num_tokens for choice in self._choices),
            self._cached_tokens(),
            sum(choice.num_reasoning_tokens for choice in self._choices),
        )

    def _cached_tokens(self) -> int:
        """Of the prompts, each once: what none of its choices had to read."""
        fewest: dict[int, int] = {}
        for prompt, num_cached in zip(self._job.prompts, self._num_cached, strict=True):
            fewest[id(prompt)] = min(fewest.get(id(prompt), num_cached), num_cached)
        return sum(fewest.values())

    async def _keep_alive(self, send: Send) -> None:
        """While a prompt waits or is read: without it clients and proxies take a silent stream for dead."""
        while True:
            wait_s = self._written_at_s + self._keep_alive_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            else:
                await self._write(send, self._shape.keep_alive)

    async def _write(self, send: Send, body: bytes, *, is_last: bool = False) -> None:
        async with self._lock:
            if self._is_ended:
                return
            self._is_ended = is_last
            if not self._is_started:
                self._is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})
            self._written_at_s = time.monotonic()

    async def _write_error(self, send: Send, error: ApiError) -> None:
        self._metrics.stream_errors.inc()
        await self._write(send, self._shape.error(error), is_last=True)

    async def _write_whole(self, send: Send, answers: list[tuple[Delta, str]]) -> None:
        content = self._shape.whole(self._job.prompts, answers, self._usage())
        body = json.dumps(content, ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _count(self) -> None:
        used = self._usage()
        self._note.num_prompt, self._note.num_completion = used.prompt_tokens, used.completion_tokens
        self._metrics.prompt_tokens.inc(used.prompt_tokens)
        self._metrics.completion_tokens.inc(used.completion_tokens)
        self._metrics.request_s.observe(time.monotonic() - self._began_at_s)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

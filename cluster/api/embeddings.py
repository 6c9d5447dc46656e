"""POST /v1/embeddings (platform.openai.com/docs/api-reference/embeddings). Event loop only.

Each input is a request of its own at the head; a few at a time, so that a long list leaves room for others.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
import time
import uuid
from collections import deque
from collections.abc import Sequence
from http import HTTPStatus

from cluster.api.access import current_note
from cluster.api.embeddings_body import EmbeddingsBody, read_inputs
from cluster.api.errors import ApiError, bad_request, internal
from cluster.api.schema import parse_body
from cluster.api.service import Service, tokenized
from cluster.logs import current_request
from planner.embedding_files import FIRST, LAST, MEAN, EmbeddingModel
from proto import head_pb2, ring_pb2

MAX_AT_ONCE = 16  # of one request's inputs

_KINDS = {LAST: ring_pb2.Pooling.LAST, MEAN: ring_pb2.Pooling.MEAN, FIRST: ring_pb2.Pooling.FIRST}


class Embeddings:
    """The handler; it raises ApiError."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, raw: bytes) -> bytes:
        """The JSON with the vectors of all inputs, in their order. Cancelled, it ends them on every stage."""
        body, service = parse_body(raw, EmbeddingsBody), self._service
        tokenizer = service.tokenizer(body.model)
        model, limits = self._model(body.model), service.limits()
        pooling = _pooling(body, model)
        prompts = await tokenized(len(raw), lambda: read_inputs(body.input, tokenizer, model, limits))
        service.check_ring(limits)
        began_s, note = time.monotonic(), current_note.get()
        note.num_prompt, note.num_completion = sum(map(len, prompts)), 0
        try:
            vectors = await self._read(body, prompts, pooling, max(1, limits.max_active + limits.max_queued))
        finally:
            service.metrics.prompt_tokens.inc(note.num_prompt)
            service.metrics.request_s.observe(time.monotonic() - began_s)
        is_packed, model_id = body.encoding_format == "base64", service.served_id(body.model)
        return await asyncio.to_thread(lambda: _list(vectors, is_packed, model_id, note.num_prompt or 0))

    def _model(self, asked: str | None) -> EmbeddingModel:
        model = self._service.embedding
        if isinstance(model, EmbeddingModel):
            return model
        raise bad_request(
            f"The model {self._service.served_id(asked)!r} gives no embeddings: {model}.",
            "model",
            "unsupported_endpoint",
        )

    async def _read(
        self, body: EmbeddingsBody, prompts: Sequence[list[int]], pooling: ring_pb2.Pooling, room: int
    ) -> list[bytes]:
        """The vector of each prompt; the first failure ends the others.

        Where the queue is full because of others, fewer are under way at once; the last one is told.
        """
        answer_id, vectors = "embd-" + uuid.uuid4().hex, [b""] * len(prompts)
        adapter = body.model if body.model in self._service.adapters else ""
        waiting = deque(enumerate(prompts))
        num_working = min(len(prompts), room, MAX_AT_ONCE)

        async def work() -> None:
            nonlocal num_working
            while waiting:
                index, prompt = waiting.popleft()
                request = head_pb2.GenerateRequest(
                    request_id=f"{answer_id}-{index}" if index else answer_id,
                    prompt=prompt,
                    sampling=ring_pb2.Sampling(pooling=pooling),
                    adapter=adapter or "",
                    priority=body.priority or 0,
                    trace_id=current_request.get(),
                )
                try:
                    vectors[index] = await self._vector(request)
                except ApiError as error:
                    if error.status != HTTPStatus.TOO_MANY_REQUESTS or num_working == 1:
                        raise
                    waiting.appendleft((index, prompt))
                    break
            num_working -= 1

        workers = [asyncio.create_task(work()) for _ in range(num_working)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return vectors

    async def _vector(self, request: head_pb2.GenerateRequest) -> bytes:
        metrics = self._service.metrics
        with contextlib.closing(self._service.head.generate(request)) as generation:
            reply = await generation.read()
        metrics.queue_s.observe(reply.queue_ms / 1e3)
        metrics.prefill_s.observe(reply.prefill_ms / 1e3)
        if not reply.vector:
            raise internal("The ring gave no vector.")
        return reply.vector


def _pooling(body: EmbeddingsBody, model: EmbeddingModel) -> ring_pb2.Pooling:
    dimensions = body.dimensions or 0
    if dimensions > model.width:
        raise bad_request(
            f"dimensions is {dimensions}, but this model's embeddings have {model.width}: ask for so many, "
            "or fewer.",
            "dimensions",
            "invalid_value",
        )
    return ring_pb2.Pooling(
        kind=_KINDS[model.pooling], dimensions=dimensions, is_normalised=model.is_normalised
    )


def _list(vectors: Sequence[bytes], is_packed: bool, model_id: str, num_prompt: int) -> bytes:
    """In pieces, between which the streams of others go on."""
    data = ", ".join(
        f'{{"object": "embedding", "index": {i}, "embedding": {json.dumps(_shown(vector, is_packed))}}}'
        for i, vector in enumerate(vectors)
    )
    usage = f'{{"prompt_tokens": {num_prompt}, "total_tokens": {num_prompt}}}'
    return (
        f'{{"object": "list", "data": [{data}], "model": {json.dumps(model_id)}, "usage": {usage}}}'.encode()
    )


def _shown(vector: bytes, is_packed: bool) -> str | list[float]:
    """float32, little-endian, as base64 of these bytes or as numbers."""
    if is_packed:
        return base64.b64encode(vector).decode()
    return [*struct.unpack(f"<{len(vector) // 4}f", vector)]

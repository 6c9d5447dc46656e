"""The HTTP routes. Event loop only; an error at this border is logged and becomes OpenAI's error object."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.api import status
from cluster.api.answer import Answer
from cluster.api.assets import INDEX, PREFIX, read_assets
from cluster.api.cors import Cors
from cluster.api.dialects import Dialects
from cluster.api.embeddings import Embeddings
from cluster.api.errors import RETRY_AFTER_S, ApiError, bad_request, internal
from cluster.api.gate import Gate, error_response, speaks_anthropic
from cluster.api.messages import model_info
from cluster.api.service import Service
from cluster.api.why import PlanWhy
from cluster.recent_lines import NUM_KEPT
from proto import head_pb2

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 << 20
BODY_TIMEOUT_S = 60.0
MAX_RANK = 10_000

T = TypeVar("T")


def make_app(service: Service, keys: Sequence[str]) -> Starlette:
    """The ASGI application; its lifespan starts and ends the head client."""
    assets, plan_why = read_assets(), PlanWhy(service.head)
    dialects, vectors = Dialects(service), Embeddings(service)

    async def page(request: Request) -> Response:
        asset = assets.get(request.path_params.get("name", INDEX))
        if asset is None:
            raise HTTPException(404)
        return asset.response(request)

    async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await _while_there(request, work)
        except ClientDisconnect:
            service.metrics.disconnects.inc()
            raise

    async def completions(request: Request) -> Answer:
        return await while_there(request, service.complete(await _read_json(request)))

    async def chat_completions(request: Request) -> Answer:
        return await while_there(request, service.chat(await _read_json(request)))

    async def messages(request: Request) -> Answer:
        return await while_there(request, dialects.messages(await _read_json(request)))

    async def count_messages(request: Request) -> Response:
        return JSONResponse(await dialects.count_messages(await _read_json(request)))

    async def responses(request: Request) -> Answer:
        return await while_there(request, dialects.responses(await _read_json(request)))

    async def count_responses(request: Request) -> Response:
        return JSONResponse(await dialects.count_responses(await _read_json(request)))

    async def embeddings(request: Request) -> Response:
        work = vectors.create(await _read_json(request))
        return Response(await while_there(request, work), media_type="application/json")

    async def models(request: Request) -> Response:
        names = (service.model, *service.adapters)
        data = [_model(service, name, request) for name in names]
        if speaks_anthropic(request.scope):
            ends = {"first_id": names[0], "last_id": names[-1]}
            return JSONResponse({"data": data, "has_more": False, **ends})
        return JSONResponse({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        service.check_model(name)
        return JSONResponse(_model(service, service.served_id(name), request))

    async def cluster(request: Request) -> Response:
        return JSONResponse(status.cluster(service.head, service.is_tokenizer_loaded, service.model))

    async def planning(request: Request) -> Response:
        return Response(await service.head.planning(), media_type="application/json")

    async def logs(request: Request) -> Response:
        rank, lines = _number(request, "rank", 0, MAX_RANK), _number(request, "lines", 1, NUM_KEPT)
        return JSONResponse({"logs": await service.head.logs(rank, NUM_KEPT if lines is None else lines)})

    async def trace(request: Request) -> Response:
        if service.tracer is None:
            raise ApiError(404, "This API cannot trace its ring.", code="not_found")
        return JSONResponse(await _while_there(request, service.tracer.trace(await _read_json(request))))

    async def why(request: Request) -> Response:
        return JSONResponse(await plan_why.get())

    async def health(request: Request) -> Response:
        content = status.health(service.head, service.is_tokenizer_loaded)
        is_ok = content["status"] == "ok"
        return JSONResponse(
            content, 200 if is_ok else 503, headers=None if is_ok else {"retry-after": str(RETRY_AFTER_S)}
        )

    async def metrics_page(request: Request) -> Response:
        page, content_type = service.metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"content-type": content_type})

    def known() -> tuple[str, head_pb2.ClusterStatus | None]:
        head = service.head
        return status.state(head, service.is_tokenizer_loaded)[0], None if head.trouble else head.status

    service.metrics.watch(known)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.head.start()
        try:
            yield
        finally:
            await service.head.close()

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_messages, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/responses/input_tokens", count_responses, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/cluster", cluster),
        Route("/v1/cluster/planning", planning),
        Route("/v1/cluster/logs", logs),
        Route("/v1/cluster/why", why),
        Route("/v1/cluster/trace", trace, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", metrics_page),
        Route("/", page),
        Route(f"{PREFIX}{{name}}", page),
    ]
    paths = frozenset(route.path for route in routes)
    handlers: dict[Any, Any] = {
        ApiError: _on_api_error,
        HTTPException: _on_http_error,
        ClientDisconnect: _on_disconnect,
        Exception: _on_bug,
    }
    middleware = [Middleware(Cors, bool(keys)), Middleware(Gate, keys, service.metrics, paths)]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    return app


def _number(request: Request, name: str, least: int, largest: int) -> int | None:
    """A whole number of the query, None where it is not there; raises ApiError."""
    text = request.query_params.get(name)
    if text is None:
        return None
    if not text.isdecimal() or not text.isascii() or len(text) > 9 or not least <= int(text) <= largest:
        raise bad_request(f"{name} must be a whole number from {least} to {largest}.", name)
    return int(text)


def _model(service: Service, name: str, request: Request) -> dict[str, Any]:
    known = service.head.status
    context = known.context if known is not None and known.context else None
    if speaks_anthropic(request.scope):
        return model_info(name, service.started_at_s, context)
    parent = {"parent": service.model} if name in service.adapters else {}
    return {
        "id": name,
        "object": "model",
        "created": service.started_at_s,
        "owned_by": "macrame",
        "max_model_len": context,
        **parent,
    }


async def _while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to, which ends when the client leaves: its grammar is not tried for nobody.

    The body has been read. Raises ClientDisconnect.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_json(request: Request) -> bytes:
    """The body; raises ApiError for another type (a web page can send those to us unasked), size or speed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            415, "The content type must be application/json.", param="content-type", code="wrong_content_type"
        )
    length = request.headers.get("content-length", "")
    if length.isdigit() and len(length) < 20 and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    parts, num_bytes = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes > MAX_BODY_BYTES:
                    raise _too_large()
                parts.append(part)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s.", headers={"connection": "close"}
        ) from None
    return b"".join(parts)


def _too_large() -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {MAX_BODY_BYTES} bytes.",
        code="body_too_large",
        headers={"connection": "close"},
    )


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return error_response(error, request.scope)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    where = f"{request.method} {request.scope['path']}"
    if error.status_code == 404:
        return error_response(ApiError(404, f"There is no {where}.", code="not_found"), request.scope)
    if error.status_code == 405:
        allowed = headers.get("Allow", "")
        message = f"{where} is not allowed; allowed: {allowed}."
        return error_response(
            ApiError(405, message, code="method_not_allowed", headers=headers), request.scope
        )
    return error_response(ApiError(error.status_code, str(error.detail), headers=headers), request.scope)


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
    return error_response(internal(), request.scope)

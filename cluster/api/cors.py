"""Which web pages a browser lets ask: CORS for /v1, before the gate. Event loop only.

Source: fetch.spec.whatwg.org/#http-cors-protocol. A preflight carries no key, does nothing and needs none.
"""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

# Without keys: pages of this machine. Any other page could use up the ring of whoever looks at it.
LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?"


class Cors:
    """Answers preflights of /v1 and marks its answers; all other paths are for their own page alone.

    With keys every page may ask, for the key is in a header that no browser adds by itself.
    """

    def __init__(self, app: ASGIApp, has_keys: bool) -> None:
        self._app = app
        self._marked = CORSMiddleware(
            app,
            allow_origins=["*"] if has_keys else (),
            allow_origin_regex=None if has_keys else LOCAL_PAGES,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # the clients' own: x-stainless-os and its like
            allow_private_network=True,
            expose_headers=("retry-after", "x-request-id", "request-id"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_api = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await (self._marked if is_api else self._app)(scope, receive, send)

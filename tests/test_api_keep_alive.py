"""What a stream says while its prompt waits or is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.api_server import CHAT, COMPLETIONS, Served, chat_body, serving

pytestmark = pytest.mark.long
SILENCE_S = 0.05
COMMENT = ": keep-alive"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), "--keep-alive-s", str(SILENCE_S)) as served:
        yield served


@pytest.fixture
def served(quick: Served) -> Served:
    """Whose first token, and each after it, comes after several times the silence."""
    quick.ring.reset()
    quick.ring.delay_s = 5 * SILENCE_S
    return quick


def events(served: Served, path: str, body: dict[str, Any]) -> list[str]:
    reply = served.http.post(path, json=body | {"stream": True})
    assert reply.status_code == 200
    return reply.text.split("\n\n")[:-1]


def test_silent_streams_get_comments(served: Served) -> None:
    for path, body in ((CHAT, chat_body()), (COMPLETIONS, {"prompt": "hi"})):
        told = events(served, path, body | {"max_tokens": 2})
        assert told[0] == COMMENT  # before the first token
        first = next(i for i, event in enumerate(told) if event != COMMENT)
        assert COMMENT in told[first:]  # and between two
        assert told[-1] == "data: [DONE]"


def test_the_openai_client_does_not_see_them(served: Served) -> None:
    stream = served.openai.chat.completions.create(model="tiny", stream=True, max_tokens=2, **chat_body())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "He"


def test_a_failure_after_a_comment_is_an_event(served: Served) -> None:
    served.ring.error, served.ring.error_at = "stage 1 ran out of memory", 0
    told = events(served, CHAT, chat_body())
    assert set(told[:-1]) == {COMMENT}
    assert "stage 1 ran out of memory" in told[-1]


def test_an_answer_in_one_piece_has_none(served: Served) -> None:
    assert served.complete(max_tokens=2)["choices"][0]["text"] == "He"

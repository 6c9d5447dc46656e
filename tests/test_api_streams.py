"""Streams: their form, their pace, their failures, and clients that leave."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import openai
import pytest

from tests.api_server import CHAT, COMPLETIONS, Served, chat_body
from tests.waiting import wait_for

NONE_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


def test_stream_form(served: Served) -> None:
    events = served.events(CHAT, chat_body(max_tokens=2))
    assert events[-1] == "[DONE]"
    assert [event["choices"][0]["delta"] for event in events[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "H"},
        {"content": "e"},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, None, "length"]
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
    assert not any("usage" in event for event in events[:-1])


def test_usage_is_null_until_the_last_chunk(served: Served) -> None:
    options = {"stream_options": {"include_usage": True}}
    *events, usage, done = served.events(COMPLETIONS, {"prompt": "hi", "max_tokens": 2, **options})
    assert done == "[DONE]"
    assert all(event["usage"] is None for event in events)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, **NONE_CACHED}


def test_several_choices_in_one_stream(served: Served) -> None:
    served.ring.delay_s = 0.002
    *events, done = served.events(CHAT, chat_body(n=3))
    assert done == "[DONE]"
    openings = [event["choices"][0] for event in events[:3]]  # in order: OpenAI's client joins no others
    assert [choice["index"] for choice in openings] == [0, 1, 2]
    assert all(choice["delta"] == {"role": "assistant", "content": ""} for choice in openings)
    texts = {0: "", 1: "", 2: ""}
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["delta"].get("content", "")
    assert set(texts.values()) == {"Hello, world."}
    order = [event["choices"][0]["index"] for event in events]
    assert order != sorted(order)  # they run side by side


def test_tokens_come_as_they_are_made(served: Served) -> None:
    served.ring.delay_s = 0.1
    with served.http.stream(
        "POST", COMPLETIONS, json={"prompt": "x", "max_tokens": 5, "stream": True}
    ) as reply:
        times = [time.monotonic() for _ in reply.iter_text()]
    assert times[-1] - times[0] > 0.3


def test_a_client_that_leaves_a_stream_frees_the_ring(served: Served) -> None:
    served.ring.delay_s = 0.02
    with served.http.stream("POST", CHAT, json=chat_body(ignore_eos=True, stream=True)) as reply:
        next(reply.iter_raw())
    served.ring.wait_closed(1)


@pytest.mark.parametrize("fields", [{}, {"n": 3}])
def test_a_client_that_leaves_while_it_waits_frees_the_ring(served: Served, fields: dict[str, Any]) -> None:
    served.ring.delay_s = 0.02
    with pytest.raises(httpx.ReadTimeout):
        served.http.post(CHAT, json=chat_body(ignore_eos=True, **fields), timeout=0.3)
    served.ring.wait_closed(len(served.ring.opened))
    assert len(served.ring.opened) == fields.get("n", 1)


@pytest.mark.long  # it is judged by a quarter of a second, which a loaded machine may take
def test_a_long_prompt_does_not_stop_other_streams(served: Served) -> None:
    served.ring.delay_s = 0.01
    text = "x" * 2000  # longer than the context, short enough to be tokenized
    body = {"prompt": [text] * 60}
    gaps: list[float] = []

    def stream() -> None:
        with httpx.Client(base_url=served.api.url) as client:
            last = time.monotonic()
            with client.stream(
                "POST", CHAT, json=chat_body(ignore_eos=True, max_tokens=60, stream=True)
            ) as reply:
                for _ in reply.iter_raw():
                    gaps.append(time.monotonic() - last)
                    last = time.monotonic()

    thread = threading.Thread(target=stream)
    thread.start()
    while thread.is_alive():
        served.error(body)
    thread.join()
    assert len(gaps) > 30
    assert max(gaps[1:]) < 0.25


# -- failures -----------------------------------------------------------------------------------------


def test_a_failure_before_the_first_token_is_a_status(served: Served) -> None:
    served.ring.error, served.ring.error_at = "stage 1 ran out of memory", 0
    for fields in ({}, {"stream": True}, {"n": 2}, {"n": 2, "stream": True}):
        error = served.error(chat_body(**fields), status=500, path=CHAT)
        assert error["message"] == "stage 1 ran out of memory"
        assert error["type"] == "server_error"


def test_a_failure_after_the_first_token_is_one_event(served: Served) -> None:
    served.ring.error, served.ring.error_at = "stage 1 ran out of memory", 3
    *events, last = served.events(CHAT, chat_body())
    assert last["error"]["message"] == "stage 1 ran out of memory"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "Hel"
    stream = served.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    with pytest.raises(openai.APIError, match="stage 1 ran out of memory"):
        list(stream)


def test_one_failed_choice_ends_all(served: Served) -> None:
    served.ring.error, served.ring.error_at = "broken", 3
    *_, last = served.events(COMPLETIONS, {"prompt": "x", "n": 3})
    assert last["error"]["message"] == "broken"
    served.ring.wait_empty()  # a choice may be cancelled before its session was opened
    assert served.ring.opened


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "x"}),
        (CHAT, chat_body()),
        ("/v1/messages", {"max_tokens": 99, "messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
def test_a_priority_reaches_the_head(served: Served, path: str, body: dict[str, Any]) -> None:
    served.ring.delay_s = 0.02
    thread = threading.Thread(target=served.http.post, args=(path,), kwargs={"json": body | {"priority": -3}})
    thread.start()
    wait_for(lambda: [r["priority"] for r in served.http.get("/v1/cluster").json()["requests"]] == [-3])
    thread.join()


@pytest.mark.long
def test_a_place_in_the_queue_ends_with_a_503(served: Served) -> None:
    served.ring.delay_s = 0.02
    threads = [
        threading.Thread(target=lambda: served.complete(ignore_eos=True, max_tokens=60)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: served.http.get("/v1/cluster").json()["num_active"] == 4)
    replies = []
    for path, body in ((COMPLETIONS, {"prompt": "x"}), (CHAT, chat_body(stream=True))):
        late = threading.Thread(target=lambda p=path, b=body: replies.append(served.http.post(p, json=b)))
        late.start()
        wait_for(lambda: served.http.get("/v1/cluster").json()["num_queued"] == 1)
        wait_for(lambda late=late: (served.ring.head.expire(), not late.is_alive())[1])
    for reply in replies:
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "10"
        error = reply.json()["error"]
        assert (error["code"], error["type"]) == ("queue_timeout", "service_unavailable_error")
        assert error["message"] == (
            "the request waited 0.05 s for its turn, which is what api.queue_timeout_s allows: "
            "4 requests run and 1 wait; try again later"
        )
    for thread in threads:
        thread.join()


def test_a_full_queue_is_a_429(served: Served) -> None:
    served.ring.delay_s = 0.02
    threads = [
        threading.Thread(target=lambda: served.complete(ignore_eos=True, max_tokens=400)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: served.http.get("/v1/cluster").json()["num_queued"] == 2)
    for fields in ({}, {"stream": True}):
        reply = served.http.post(COMPLETIONS, json={"prompt": "x", **fields})
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "queue_full"
        assert reply.json()["error"]["type"] == "rate_limit_error"
    requests = served.http.get("/v1/cluster").json()["requests"]
    assert {(r["model"], r["adapter"], r["max_tokens"]) for r in requests} == {("tiny", "", 400)}
    assert all(r["id"].startswith("cmpl-") and r["age_s"] > 0 for r in requests)
    served.ring.delay_s = 0.0  # they were to last until here
    for thread in threads:
        thread.join()
    wait_for(lambda: served.http.get("/v1/cluster").json()["requests"] == [])

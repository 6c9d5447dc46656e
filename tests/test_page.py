"""The web page in a real headless Chromium before real rings: at work, a node dead, empty, locked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.demo.run import CONFIG
from tests.api_server import serving, started, wait_healthy
from tests.browser import SIZES, STATE, Look, ask, chromium, looking
from tests.ring_processes import RingProcesses
from tests.scripted_ring import ScriptedRing
from tests.waiting import wait_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

MODEL = CONFIG.parent / "model"  # of the demo: nine layers, and it answers in words
LAYERS = [(0, 3), (3, 8), (8, 9)]
LOOKS = [(size, theme) for size in SIZES for theme in ("light", "dark")]


@pytest.fixture
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


@contextmanager
def ring(directory: Path, **config: Any) -> Iterator[RingProcesses]:
    with RingProcesses(directory, MODEL, LAYERS, context=2048, with_api=True, **config) as processes:
        yield processes


@contextmanager
def asking(url: str, count: int) -> Iterator[None]:
    """So many long answers are asked for; all end when the block does."""
    stop = threading.Event()

    def ask() -> None:
        body = {"prompt": "def fibonacci(n):", "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(timeout=120.0) as http,
            http.stream("POST", f"{url}v1/completions", json=body) as reply,
        ):
            for _ in reply.iter_lines():
                if stop.is_set():
                    return

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# -- a ring at work ---------------------------------------------------------------------------------------


def test_a_ring_that_answers_eight_requests(tmp_path: Path, browser: Any) -> None:
    with ring(tmp_path) as processes:
        url = f"{processes.wait_api()}/"
        with asking(url, 8):
            for size, theme in LOOKS:
                with looking(browser, url, size=size, theme=theme) as look:
                    check_ring_at_work(look)
                    look.shot("at-work")


def check_ring_at_work(look: Look) -> None:
    look.wait(f"{STATE} === 'serving'")
    look.wait("document.querySelectorAll('.requests li').length === 8")
    look.wait("Number(document.querySelector('.ring .big').textContent) > 0")
    look.wait(
        "[...document.querySelectorAll('.speed')].filter(e => parseFloat(e.textContent) > 0).length === 3"
    )
    page = look.page
    assert page.locator(".bead.good").count() == 9
    assert page.locator(".requests .state").all_inner_texts() == ["answering"] * 4 + ["waiting"] * 4
    assert page.locator("ol.nodes h3").all_inner_texts() == ["n0head", "n1", "n2"]
    look.wait("document.querySelectorAll('.ring .latency').length === 3")
    links = page.locator(".link").all_inner_texts()
    assert [link.partition(":")[0] for link in links] == ["→ to n1", "→ to n2", "↺ back to n0"]
    assert all(" ms on this machine" in link for link in links)
    assert "4 of 4" in look.text(".totals")
    look.wait("document.querySelector('.why') !== null")
    assert "its layers are forced to 3:8" in look.text("#why-body")
    assert "forced" not in look.text("#plan-body")
    assert page.locator("tbody tr").count() == 3
    widths = page.evaluate("[...document.querySelectorAll('.bar')].map(e => e.firstChild.offsetWidth)")
    assert all(width >= 2 for width in widths)


def test_a_chat_is_streamed_stopped_and_begun_anew(tmp_path: Path, browser: Any) -> None:
    with ring(tmp_path) as processes, looking(browser, f"{processes.wait_api()}/") as look:
        look.wait(f"{STATE} === 'serving'")
        look.page.click("#chat summary")
        look.page.fill("#temperature", "0")
        look.page.fill("#max-tokens", "40")
        ask(look, "def fibonacci(n):")
        look.wait("document.querySelector('.stats')?.textContent.includes('tok/s')")
        answer = look.text(".message.assistant .text")
        expected = httpx.post(
            f"{look.url}v1/chat/completions",
            json={
                "messages": [{"role": "user", "content": "def fibonacci(n):"}],
                "temperature": 0,
                "max_tokens": 40,
            },
        ).json()["choices"][0]["message"]["content"]
        assert answer.split() == expected.split()
        assert look.text("#chat-news").startswith("Answer: ")
        look.shot("chat")

        look.page.fill("#max-tokens", "")
        ask(look, "class Tree:\n    def __init__(self):")
        look.wait("document.querySelectorAll('.message.assistant .text')[1].textContent.length > 0")
        assert look.text("#send") == "Stop"
        look.page.focus("#question")
        look.page.keyboard.press("Escape")
        look.wait("document.querySelector('#send').textContent === 'Send'")
        wait_for(lambda: httpx.get(f"{look.url}v1/cluster").json()["requests"] == [])
        look.page.click("#chat-clear")
        assert look.page.locator(".message").count() == 0


def test_a_dead_node_is_seen_and_its_return_too(tmp_path: Path, browser: Any) -> None:
    with ring(tmp_path) as processes:
        url = f"{processes.wait_api()}/"
        with ExitStack() as stack:
            looks = [
                stack.enter_context(looking(browser, url, size=size, theme=theme)) for size, theme in LOOKS
            ]
            for look in looks:
                look.wait(f"{STATE} === 'serving'")
            processes.kill(1)
            for look in looks:
                look.page.bring_to_front()
                look.wait(f"{STATE} === 'not serving'")
                assert look.page.locator(".bead.bad").count() == 5
                assert look.page.text_content(".ring .big") == "Down"
                assert look.text("ol.nodes li:nth-child(2) .state").startswith("gone")
                assert "rank 1 (n1, 127.0.0.1:" in look.text("#reason")
                look.shot("node-dead")
            ask(looks[0], "Hello?")
            looks[0].wait("document.querySelector('.message .error') !== null")
            assert looks[0].text(".message .error").startswith("the ring broke: rank ")
            processes.start(1)
            processes.wait_ok()
            looks[0].page.bring_to_front()
            looks[0].wait(f"{STATE} === 'serving'")
            assert looks[0].page.locator(".bead.good").count() == 9
            looks[0].page.click("text=Try again")
            looks[0].wait("document.querySelector('.stats')?.textContent.includes('tokens')")


def test_a_ring_whose_nodes_are_not_there_yet(tmp_path: Path, browser: Any) -> None:
    processes = RingProcesses(tmp_path, MODEL, LAYERS, with_api=True)
    try:
        processes.start(0)
        processes.wait_listening(0)
        url = f"http://127.0.0.1:{processes.api_port}/"

        def is_there() -> bool:
            try:
                return httpx.get(f"{url}v1/cluster").json()["nodes"] != []
            except httpx.TransportError:
                return False

        wait_for(is_there, 60.0)
        for size, theme in LOOKS:
            with looking(browser, url, size=size, theme=theme) as look:
                look.wait("document.querySelectorAll('.node').length === 3")
                look.wait("document.querySelector('#reason').textContent.includes('not there yet')")
                assert look.text("#requests-body") == "Nothing is running."
                look.shot("empty")
    finally:
        processes.stop()


# -- who may see it ---------------------------------------------------------------------------------------


def test_a_browser_without_the_key_sees_the_lock_alone(tmp_path: Path, browser: Any) -> None:
    scripted = ScriptedRing()
    with ExitStack() as stack:
        stack.callback(scripted.close)
        head = f"127.0.0.1:{scripted.port}"
        api, http = stack.enter_context(started(tmp_path, head, MACRAME_API_KEYS="one-key"))
        wait_healthy(http)
        for size, theme in LOOKS:
            with looking(browser, f"{api.url}/", size=size, theme=theme) as look:
                check_lock(look)


def check_lock(look: Look) -> None:
    page = look.page
    look.wait("!document.querySelector('#sign-in').hidden")
    assert not page.is_visible("#board")
    assert page.evaluate("document.activeElement.id") == "key"
    assert look.text("#key-error") == ""
    page.keyboard.type("no-key")
    page.keyboard.press("Enter")
    look.wait("document.querySelector('#key-error').textContent === 'This is no key of this cluster.'")
    assert page.evaluate("sessionStorage.length") == 0
    look.shot("wrong-key")
    page.keyboard.type("one-key")
    page.keyboard.press("Enter")
    look.wait(f"{STATE} === 'serving'")
    assert not page.is_visible("#sign-in")
    ask(look, "hi")
    look.wait("document.querySelector('.stats') !== null")
    assert look.text(".message.assistant .text") == "Hello, world."
    page.reload()
    look.wait(f"{STATE} === 'serving'")  # the tab knows it still
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.click("#sign-out")
    look.wait("!document.querySelector('#sign-in').hidden")
    assert page.evaluate("sessionStorage.length") == 0
    for place in (
        "#ring",
        "#nodes",
        "#plan-body",
        "#requests-body",
        "#model",
    ):  # nothing is left behind the lock
        assert page.text_content(place) == "", place


def test_a_key_that_is_taken_back_locks_the_page(tmp_path: Path, browser: Any) -> None:
    with serving(tmp_path) as served, looking(browser, f"{served.api.url}/") as look:
        look.wait(f"{STATE} === 'serving'")
        refusal = {"status": 401, "json": {"error": {"message": "The API key is missing or wrong"}}}
        look.page.route("**/v1/cluster", lambda route: route.fulfill(**refusal))
        look.wait("!document.querySelector('#sign-in').hidden")
        assert not look.page.is_visible("#board")

"""The web page in Chromium: hostile text, broken connections, the keyboard, a hidden tab."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api_server import Served, head_process, serving, started, wait_healthy
from tests.browser import STATE, ask, chromium, looking

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]


@pytest.fixture
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


# -- what it shows is text --------------------------------------------------------------------------------

HOSTILE = (
    b"<img src=x onerror=alert(1)> **bold** `a<b` [x](javascript:alert(1))\n"
    b"```html\n  <script>1</script>\n```"
)


def test_an_answer_is_text_whatever_it_holds(tmp_path: Path, browser: Any) -> None:
    with serving(tmp_path) as served, looking(browser, f"{served.api.url}/") as look:
        served.ring.text = HOSTILE
        look.wait(f"{STATE} === 'serving'")
        ask(look, "<b>hello</b>")
        look.wait("document.querySelector('.stats') !== null")
        text = look.text(".message.assistant .text")
        assert "<img src=x onerror=alert(1)> bold a<b [x](javascript:alert(1))" in text
        assert look.page.locator(".message :is(img, script, a, b)").count() == 0
        assert look.text(".message.assistant strong") == "bold"
        assert look.text(".message.assistant pre code") == "  <script>1</script>"
        assert look.text(".message.user .text") == "<b>hello</b>"


def test_names_and_log_lines_are_text(tmp_path: Path, browser: Any) -> None:
    name = "<img src=x onerror=alert(1)>"
    line = {"time_s": 1.8e9, "level": "ERROR", "message": f"out of memory {name}", "request_id": "abc"}
    with serving(tmp_path) as served, looking(browser, f"{served.api.url}/") as look:
        cluster = served.http.get("/v1/cluster").json()
        cluster["nodes"][0] |= {"name": name, "state": "failed", "reason": name}
        cluster |= {"status": "degraded", "reason": name, "model": name}
        logs = {"logs": [{"rank": 0, "name": name, "lines": [line]}]}
        look.page.route("**/v1/cluster", lambda route: route.fulfill(json=cluster))
        look.page.route("**/v1/cluster/logs*", lambda route: route.fulfill(json=logs))
        look.page.reload()
        look.wait(
            "document.querySelector('.lines')?.textContent.includes('out of memory')"
        )  # opened by itself
        for place in ("#model", "#reason", ".node h3", ".node .error", ".lines"):
            assert name in look.text(place), place
        assert look.page.locator("main img").count() == 0
        look.shot("log")


def test_the_policy_refuses_markup_and_inline_scripts(tmp_path: Path, browser: Any) -> None:
    with serving(tmp_path) as served, looking(browser, f"{served.api.url}/") as look:
        refused = look.page.evaluate(
            "() => { try { document.body.innerHTML = '<p>x</p>'; } catch (e) { return e.name; } }"
        )
        assert refused == "TypeError"
        assert any("TrustedHTML" in fault for fault in look.faults)
        look.faults.clear()
        ran = look.page.evaluate(
            "async () => { const s = document.createElement('style'); s.textContent = 'body{opacity:0.5}';"
            " document.head.append(s); return getComputedStyle(document.body).opacity; }"
        )
        assert ran == "1"
        assert any("Content Security Policy" in fault for fault in look.faults)
        look.faults.clear()


# -- when things break ------------------------------------------------------------------------------------


def test_a_server_that_goes_away_is_told_and_found_again(tmp_path: Path, browser: Any) -> None:
    with serving(tmp_path) as served, looking(browser, f"{served.api.url}/") as look:
        look.wait(f"{STATE} === 'serving'")
        look.page.route("**/v1/**", lambda route: route.abort())
        look.wait("document.querySelector('#notices').textContent.includes('cannot be reached')")
        ask(look, "hi")
        look.wait("document.querySelector('.message .error') !== null")
        assert look.text(".message .error").startswith("The server cannot be reached.")
        look.page.unroute("**/v1/**")
        look.wait("document.querySelector('#notices').textContent === ''")
        look.page.click("text=Try again")
        look.wait("document.querySelector('.stats') !== null")
        assert look.text(".message.assistant .text") == "Hello, world."
        assert prompt(served) == "hi"  # the failed answer is no part of it


def prompt(served: Served) -> str:
    """The newest one, without the marks of the template."""
    tokens = served.ring.prompts[served.ring.last.session]
    return bytes(token for token in tokens if token < 256).decode()


def test_a_stream_that_breaks_keeps_what_came(tmp_path: Path, browser: Any) -> None:
    with serving(tmp_path) as served, looking(browser, f"{served.api.url}/") as look:
        served.ring.error, served.ring.error_at = "stage 1 ran out of memory", 5
        look.wait(f"{STATE} === 'serving'")
        ask(look, "hi")
        look.wait("document.querySelector('.message .error') !== null")
        assert look.text(".message.assistant .text") == "Hello"
        assert look.text(".message .error").startswith("stage 1 ran out of memory")


def test_a_frozen_head_is_told(tmp_path: Path, browser: Any) -> None:
    with head_process() as (process, port), started(tmp_path, f"127.0.0.1:{port}") as (api, http):
        wait_healthy(http)
        with looking(browser, f"{api.url}/") as look:
            look.wait(f"{STATE} === 'serving'")
            process.kill()
            look.wait(f"{STATE} === 'not serving'")
            assert "cannot be reached" in look.text("#reason")


# -- keyboard and screen reader ---------------------------------------------------------------------------

NAMELESS = """() => [...document.querySelectorAll(
    'button, input, select, textarea, summary, progress, [role=region]')]
  .filter(e => e.checkVisibility() && !(e.ariaLabel || e.labels?.length || e.textContent.trim()))
  .map(e => e.outerHTML)"""
HEADINGS = "[...document.querySelectorAll('h1, h2, h3')].filter(e => e.checkVisibility()).map(e => e.tagName)"


def test_it_is_used_by_keyboard_and_read_aloud(tmp_path: Path, browser: Any) -> None:
    with serving(tmp_path) as served, looking(browser, f"{served.api.url}/") as look:
        page = look.page
        look.wait(f"{STATE} === 'serving'")
        assert page.evaluate("document.documentElement.lang") == "en"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the chat"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") != "question":
            page.focus("#question")
        page.keyboard.type("hi")
        page.keyboard.press("Enter")
        look.wait("document.querySelector('#chat-news').textContent === 'Answer: Hello, world.'")
        page.focus("#question")  # a new line, and no message
        page.keyboard.type("a")
        page.keyboard.press("Shift+Enter")
        assert page.input_value("#question") == "a\n"
        assert page.evaluate(NAMELESS) == []
        assert "H1" not in page.evaluate(HEADINGS)[1:]
        assert page.get_attribute(".ring svg", "aria-label")
        assert page.get_attribute("#state", "role") == "status"
        page.select_option("#theme", "dark")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_what_is_open_or_marked_stays_so_while_it_is_renewed(tmp_path: Path, browser: Any) -> None:
    with serving(tmp_path) as served, looking(browser, f"{served.api.url}/") as look:
        look.wait(f"{STATE} === 'serving'")
        look.page.evaluate("window.kept = document.querySelector('.node h3').firstChild")
        served.ring.set_state("degraded", "rank 1 is gone")
        look.wait(f"{STATE} === 'not serving'")
        served.ring.set_state("ok", "")
        look.wait(f"{STATE} === 'serving'")
        assert look.page.evaluate("window.kept === document.querySelector('.node h3').firstChild")


def test_a_hidden_tab_asks_for_nothing(tmp_path: Path, browser: Any) -> None:
    with serving(tmp_path) as served, looking(browser, f"{served.api.url}/") as look:
        look.wait(f"{STATE} === 'serving'")
        look.page.evaluate(
            "Object.defineProperty(document, 'hidden', {get: () => window.isAway}); window.isAway = true"
        )
        asked: list[str] = []
        look.page.wait_for_timeout(1200)  # a poll that had begun
        look.page.on("request", lambda request: asked.append(request.url))
        look.page.wait_for_timeout(2500)
        assert asked == []
        look.page.evaluate("window.isAway = false; document.dispatchEvent(new Event('visibilitychange'))")
        look.wait_until(lambda: f"{look.url}v1/cluster" in asked)

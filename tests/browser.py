"""A real headless Chromium for the tests of the web page, through playwright; one browser for each test."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SIZES = {"wide": (1280, 900), "phone": (390, 844)}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
STATE = "document.querySelector('#state').textContent"
SHOTS = os.environ.get("MACRAME_SHOTS", "")  # a folder for pictures of what the tests look at


class Look:
    """A tab and all that it complained of or asked elsewhere for, which must be nothing when it closes."""

    def __init__(self, page: Any, url: str, name: str) -> None:
        self.page, self.url, self.name = page, url, name
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        page.on("request", self._note_request)
        page.on("console", self._note_message)

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith(self.url):
            self.faults.append(f"asked elsewhere: {request.url}")

    def _note_message(self, message: Any) -> None:
        # The browser itself reports every answer of 400 and above, which the page handles.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.faults.append(f"{message.type}: {message.text}")

    def shot(self, what: str) -> None:
        """A picture of the whole page, where MACRAME_SHOTS names a folder."""
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.evaluate("scrollTo(0, 0)")
            self.page.screenshot(path=Path(SHOTS) / f"{what}-{self.name}.png", full_page=True)

    def wait(self, condition: str, timeout_s: float = 20.0) -> None:
        """Until a JavaScript expression holds. Playwright's own wait needs eval, which the page forbids."""
        deadline = time.monotonic() + timeout_s
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"not in {timeout_s} s: {condition}"
            self.page.wait_for_timeout(50)

    def wait_until(self, test: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Until something holds that the tab's events change."""
        deadline = time.monotonic() + timeout_s
        while not test():
            assert time.monotonic() < deadline, f"not in {timeout_s} s"
            self.page.wait_for_timeout(50)

    def text(self, selector: str) -> str:
        """What a reader sees there."""
        return str(self.page.inner_text(selector))


def ask(look: Look, question: str) -> None:
    """In the chat."""
    look.page.fill("#question", question)
    look.page.click("#send")


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; the test is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def looking(browser: Any, url: str, *, size: str = "wide", theme: str = "light") -> Iterator[Look]:
    """A tab of its own session at `url`, which ends with a slash."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, has_touch=size == "phone"
    )
    try:
        look = Look(context.new_page(), url, f"{size}-{theme}")
        look.page.goto(url)
        yield look
        assert look.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is too wide"
        assert not look.faults
    finally:
        context.close()

"""The clients of a soak: each comes, asks one thing, reads the answer or leaves in its middle, comes back.

All of them run in one event loop, on plain sockets: a connection for each request, closed at its end.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.soak_requests import Alone, Ask, Lone

READ_LIMIT_S = 120.0  # between two pieces of an answer
NEAR = 5e-5  # of log-probabilities: rows that share a pass are rounded otherwise, up to 2e-5 in gemma3_text
PAUSE_S = 1.0  # mean, before a client comes again
WAVE_S, CALM_PAUSE_S = 5.0, 8.0  # every other wave is calm: then the queue empties, and answers are kept
LEAVE_SHARE = 0.25
SILENT = "has been silent for"
HEAD = """POST /v1/completions HTTP/1.1
Host: 127.0.0.1
Content-Type: application/json
Content-Length: {nbytes}
Connection: close

"""


@dataclass(slots=True)
class Tally:
    """What came of all requests. Written in the event loop."""

    counts: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_cached: int = 0
    max_far: float = 0.0  # of a log-probability from that of the lone run
    ties: list[str] = field(default_factory=list)  # draws that rounding decided, with their gaps
    wrong: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Crowd:
    """Clients of the API at `port`, until `until` (time.monotonic()) or the first wrong answer."""

    port: int
    asks: list[Ask]
    lone: Mapping[int, Lone]  # by index of `asks`
    alone: Alone
    num_clients: int
    until: float
    seed: int
    excuses_silence: bool = False  # a ring that breaks because a starved process was silent is waited for
    tally: Tally = field(default_factory=Tally)

    async def run(self) -> None:
        """All of them come at once, and the last one leaves after `until`."""
        async with asyncio.TaskGroup() as group:
            for number in range(self.num_clients):
                group.create_task(self._client(random.Random(f"{self.seed} {number}")))

    async def _client(self, rng: random.Random) -> None:
        while time.monotonic() < self.until and not self.tally.wrong:
            number = rng.randrange(len(self.asks))
            ask = self.asks[number]
            leave_after = rng.randrange(ask.max_tokens) if rng.random() < LEAVE_SHARE else None
            try:
                pause_s = await self._one(number, ask, leave_after)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                self.tally.wrong.append(f"request {number} broke: {error!r}")
                return
            is_calm = int((self.until - time.monotonic()) / WAVE_S) % 2
            await asyncio.sleep(max(pause_s, CALM_PAUSE_S * is_calm) * rng.uniform(0.5, 1.5))

    async def _one(self, number: int, ask: Ask, leave_after: int | None) -> float:
        """Ask once; how long to stay away."""
        tally, got = self.tally, _Got()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            content = json.dumps(ask.body).encode()
            writer.write(HEAD.format(nbytes=len(content)).replace("\n", "\r\n").encode() + content)
            if leave_after == 0 and number % 2:
                await writer.drain()
                tally.counts["left before the answer began"] += 1
                return PAUSE_S
            status, headers = await asyncio.wait_for(_head(reader), READ_LIMIT_S)
            if status == 429:
                tally.counts["told to come later"] += 1
                return max(PAUSE_S, min(2.0, float(headers["retry-after"])))
            if status == 503 and self.excuses_silence:
                tally.counts["told that the ring is not there"] += 1
                return PAUSE_S
            if status != 200:
                body = (await asyncio.wait_for(reader.read(4000), READ_LIMIT_S)).decode()
                tally.wrong.append(f"request {number} got {status}: {body}")
                return PAUSE_S
            async for event in _events(reader):
                got.take(event)
                if leave_after is not None and len(got.ids) > leave_after:
                    break
        finally:
            writer.transport.abort()  # closes at once, whatever may still be on its way
        tally.num_tokens += len(got.ids)
        tally.num_cached += got.num_cached
        self._compare(number, ask, got)
        return PAUSE_S

    def _compare(self, number: int, ask: Ask, got: _Got) -> None:
        tally, lone = self.tally, self.lone[number]
        ids = tuple(got.ids)
        if SILENT in got.error and self.excuses_silence:
            tally.counts["broken off by a silent process"] += 1
        elif got.error:
            tally.wrong.append(f"request {number} failed: {got.error}")
        elif ids != lone.ids[: len(ids)] or (got.is_whole and len(ids) != len(lone.ids)):
            self._explain(number, ask, ids, lone)
        elif got.is_whole:
            tally.counts["whole"] += 1
            kind = "greedy" if not ask.sampling["temperature"] else "drawn"
            tally.counts[kind] += 1
            pairs = zip(got.logprobs, lone.logprobs, strict=True) if ask.has_logprobs else ()
            far = max((abs(a - b) for a, b in pairs), default=0.0)
            tally.max_far = max(tally.max_far, far)
            if (got.text, got.finish_reason) != (lone.text, lone.finish_reason):
                tally.wrong.append(f"request {number}: {got.text!r} {got.finish_reason}, alone {lone}; {ask}")
            elif got.num_counted != len(ids):
                tally.wrong.append(f"request {number}: usage says {got.num_counted} tokens of {len(ids)}")
            elif far > NEAR:
                tally.wrong.append(f"request {number}: log-probabilities differ by {far:.2g}; {ask}")
            else:
                tally.counts["with a stop string"] += bool(ask.stop)
                tally.counts["with log-probabilities"] += ask.has_logprobs
        else:
            tally.counts["left in the middle"] += 1

    def _explain(self, number: int, ask: Ask, ids: tuple[int, ...], lone: Lone) -> None:
        """Another answer than alone: it stands only where rounding may have decided."""
        at = next((i for i, (a, b) in enumerate(zip(ids, lone.ids, strict=False)) if a != b), None)
        if at is None:
            self.tally.wrong.append(f"request {number}: {len(ids)} tokens, alone {len(lone.ids)}; {ask}")
            return
        gap = self.alone.gap(ask, lone.ids[: at + 1], ids[at])
        allowed = 2 * NEAR / (ask.sampling["temperature"] or 1.0)
        says = f"request {number}: token {at} is {ids[at]}, alone {lone.ids[at]}, gap {gap:.2g}"
        if 0 <= gap < allowed:
            self.tally.ties.append(says)
        else:
            self.tally.wrong.append(f"{says}; {ask}")


@dataclass(slots=True)
class _Got:
    """An answer as it comes."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    num_cached: int = 0
    num_counted: int = 0

    @property
    def is_whole(self) -> bool:
        return bool(self.finish_reason)

    def take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = event["error"]["message"]
        if event.get("usage"):
            self.num_counted = event["usage"]["completion_tokens"]
            self.num_cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
        for choice in event.get("choices", ()):
            self.ids += choice.get("token_ids") or ()
            self.text += choice["text"]
            self.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or ()
            self.finish_reason = choice["finish_reason"] or self.finish_reason


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, by their small names."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    pairs = (line.split(":", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, value in pairs}


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The events of a chunked answer, but [DONE]."""
    rest = b""
    while size := int(await asyncio.wait_for(reader.readline(), READ_LIMIT_S), 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: {"):
                yield json.loads(event[6:])

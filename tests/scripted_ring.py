"""The real head service and scheduler over a ring of one thread that answers from a script.

What whole-ring tests cannot arrange: answers with chosen bytes, chosen log-probabilities, chosen failures.
`python -m tests.scripted_ring PORT TEXT DELAY_S` runs it alone, for tests that stop its process.
"""

from __future__ import annotations

import queue
import struct
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

from cluster.abilities import Abilities
from cluster.head import Head
from cluster.room import Limits
from proto import control_pb2, head_pb2, head_pb2_grpc, ring_pb2
from tests.tiny_models import EOS_ID, VOCAB_SIZE
from tests.waiting import wait_for

CONTEXT = 600
WIDTH = 8  # of vectors
MAX_QUEUED = 2
QUEUE_TIMEOUT_S = 0.05  # passed once `head.expire` is called


class ScriptedRing:
    """Every session answers with the ids of `text` (a byte's is itself), then end-of-text, and over again."""

    def __init__(self, text: Sequence[int] = b"Hello, world.", *, port: int = 0, max_active: int = 4) -> None:
        self.text = text
        self.delay_s = 0.0
        self.error = ""  # a stage's failure, at the token of index `error_at`
        self.error_at = 0
        self.logprobs: dict[int, float] = {}
        self.opened: list[ring_pb2.SessionSpec] = []
        self.prompts: dict[int, list[int]] = {}
        self.most_at_once = 0  # sessions that were open when a vector was made
        self.closed: set[int] = set()
        self.state, self.reason, self.plan_json = "ok", "", ""
        self._limits = Limits(context=CONTEXT, max_active=max_active, max_in_flight=4, vocab_size=VOCAB_SIZE)
        self._changed = threading.Condition()
        self._frames: queue.SimpleQueue[ring_pb2.Frame | None] = queue.SimpleQueue()
        self._drawn: dict[int, int] = {}
        self.head = Head(
            max_queued=MAX_QUEUED,
            queue_timeout_s=QUEUE_TIMEOUT_S,
            feed=self._frames.put,
            cluster_status=self._status,
            changed=self._changed,
        )
        self.head.abilities = Abilities(why_no_vectors="")
        self.head.ring_up(1, self._limits)
        self._thread = threading.Thread(target=self._compute, name="scripted-ring")
        self._thread.start()
        self._workers = ThreadPoolExecutor(max_workers=32)
        self._server = grpc.server(self._workers)
        head_pb2_grpc.add_HeadServicer_to_server(self.head, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def reset(self) -> None:
        """As it was made, for the next test."""
        self.text, self.delay_s, self.logprobs = b"Hello, world.", 0.0, {}
        self.error, self.error_at = "", 0
        self.head.planned_from = head_pb2.PlanningReply()
        if (self.state, self.reason, self.plan_json) != ("ok", "", ""):
            self.plan_json = ""
            self.set_state("ok", "")
        self.opened.clear()
        self.closed.clear()
        self.most_at_once = 0

    def set_state(self, state: str, reason: str) -> None:
        """What the cluster says of itself."""
        with self._changed:
            self.state, self.reason = state, reason
            self._changed.notify_all()

    def close(self) -> None:
        self.head.close()
        self._server.stop(0.5).wait()
        self._workers.shutdown()
        self._frames.put(None)
        self._thread.join()

    @property
    def last(self) -> ring_pb2.SessionSpec:
        """What the newest session was opened with."""
        return self.opened[-1]

    def wait_asked(self, count: int) -> None:
        """Until so many requests run or wait."""
        wait_for(lambda: self._num_asked() >= count, 10.0, f"{count} requests have come")

    def wait_closed(self, count: int, timeout_s: float = 2.0) -> None:
        """Until so many sessions were freed."""
        wait_for(lambda: len(self.closed) >= count, timeout_s, f"{count} sessions are freed")

    def wait_empty(self, timeout_s: float = 2.0) -> None:
        """Until no request runs or waits and every session that was opened is freed."""
        wait_for(lambda: self._is_empty, timeout_s, "every session is freed")

    def _num_asked(self) -> int:
        status = self._status()
        return status.num_active + status.num_queued

    @property
    def _is_empty(self) -> bool:
        status = self._status()
        opened = {spec.session for spec in list(self.opened)}
        return status.num_active == status.num_queued == 0 and opened <= self.closed

    def _status(self) -> head_pb2.ClusterStatus:
        status = head_pb2.ClusterStatus(status=self.state, epoch=1, reason=self.reason)
        status.plan_json = self.plan_json
        node = control_pb2.NodeStatus(rank=0, name="n0", state=control_pb2.READY, loaded_bytes=123 << 33)
        state = "ready" if self.state == "ok" else "failed"
        status.ranks.add(rank=0, name="n0", state=state, reason=self.reason, node=node)
        self.head.fill(status)
        return status

    def _compute(self) -> None:
        while (frame := self._frames.get()) is not None:
            for spec in frame.opens:
                self.opened.append(spec)
                self._drawn[spec.session] = 0
                self.prompts[spec.session] = []
            for slot in frame.slots:
                done = self._drawn[slot.session]
                if not done:
                    self._read(slot)
                    self._pool(slot)
                if not slot.is_sampled:
                    continue
                if self.delay_s:
                    time.sleep(self.delay_s)
                if self.error and done == self.error_at:
                    slot.error = self.error
                slot.result.CopyFrom(self._token(done))
                self._drawn[slot.session] += 1
            self.closed.update(frame.closes)
            if frame.slots:
                self.head.on_result(frame)

    def _read(self, slot: ring_pb2.Slot) -> None:
        """A prompt's tokens: scored, where that was asked for, as minus a hundredth of their ids."""
        prompt = self.prompts[slot.session]
        spec = next(spec for spec in self.opened if spec.session == slot.session)
        if spec.sampling.prompt_logprobs:
            for token in slot.tokens if prompt else slot.tokens[1:]:
                slot.prompt.add(id=token, logprob=-token / 100).top.add(id=0x7A, logprob=-0.25)
        prompt += slot.tokens

    def _pool(self, slot: ring_pb2.Slot) -> None:
        """A prompt that becomes a vector: the first numbers of it are its tokens, the others are 0.1."""
        spec, prompt = next(s for s in self.opened if s.session == slot.session), self.prompts[slot.session]
        if not spec.sampling.pooling.kind or len(prompt) < spec.prompt_tokens:
            return
        if self.delay_s:
            time.sleep(self.delay_s)
        self.most_at_once = max(self.most_at_once, len(self.opened) - len(self.closed))
        slot.error = self.error
        numbers = [*prompt, *[0.1] * WIDTH][: spec.sampling.pooling.dimensions or WIDTH]
        slot.vector = struct.pack(f"<{len(numbers)}f", *numbers)

    def _token(self, index: int) -> ring_pb2.SampledToken:
        place = index % (len(self.text) + 1)
        token = self.text[place] if place < len(self.text) else EOS_ID
        result = ring_pb2.SampledToken(id=token, logprob=self.logprobs.get(token, -0.5))
        result.top.add(id=token, logprob=result.logprob)
        result.top.add(id=0x7A, logprob=-2.0)
        return result


def main(port: str, text: str, delay_s: str) -> None:
    """Runs until it is killed, or its standard input ends."""
    ring = ScriptedRing(text.encode(), port=int(port))
    ring.delay_s = float(delay_s)
    print(ring.port, flush=True)
    sys.stdin.read()
    ring.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

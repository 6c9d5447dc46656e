"""How what is due becomes frames: their numbers, what rides on them, which are in the ring. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.request import BY_ITSELF, Request
from cluster.speculation import Window
from proto import ring_pb2


@dataclass(slots=True)
class Outbox:
    """Of one scheduler, whose lock guards it."""

    epoch: int = 0
    in_flight: dict[int, tuple[int, ...]] = field(default_factory=dict)  # seq -> sessions
    chunks: set[int] = field(default_factory=set)  # of those, the frames of prompts
    num_chunks_sent: int = 0
    closes: list[int] = field(default_factory=list)  # sessions that end with the next frame
    keeps: dict[int, int] = field(default_factory=dict)  # those that end and stay -> how many of their tokens
    _next_seq: int = 1

    @property
    def num_row_frames(self) -> int:
        """Frames in the ring with tokens of answers."""
        return len(self.in_flight) - len(self.chunks)

    @property
    def busy(self) -> set[int]:
        """Sessions of which a frame is in the ring."""
        return {session for sessions in self.in_flight.values() for session in sessions}

    def clear(self) -> None:
        """The ring broke: none of its frames is expected back."""
        for state in (self.in_flight, self.chunks, self.closes, self.keeps):
            state.clear()

    def take(self, seq: int) -> tuple[int, ...] | None:
        """A frame came back: its sessions; None for one that is not in the ring."""
        self.chunks.discard(seq)
        return self.in_flight.pop(seq, None)

    def frame(self, sessions: tuple[int, ...] = (), sources: Collection[int] = ()) -> ring_pb2.Frame:
        """An empty one that takes along what waits to ride on it. It comes back where it has sessions.

        sources: those that others begin with in it, as what is kept of them.
        """
        frame = ring_pb2.Frame(kind=ring_pb2.STEP, epoch=self.epoch, seq=self._next_seq, closes=self.closes)
        for session, num_tokens in self.keeps.items():
            if session not in frame.closes or session in sources:
                frame.keeps.append(session)
                frame.keep_tokens.append(num_tokens)
        self.closes.clear()
        self.keeps.clear()
        if sessions:
            self.in_flight[self._next_seq] = sessions
        self._next_seq += 1
        return frame

    def prompts(
        self,
        requests: Sequence[Request],
        num_tokens: int,
        copies: Mapping[int, int],
        begins: Collection[Request],
    ) -> ring_pb2.Frame:
        """The next `num_tokens` of the prompt of each; begins: those that the stages do not know yet.

        copies: by session, the new one that is its copy then.
        """
        requests = _in_order(requests)
        sources = {request.from_session for request in begins}
        frame = self.frame((*(request.session for request in requests), *copies.values()), sources)
        self.chunks.add(frame.seq)
        self.num_chunks_sent += 1
        for session, copy in copies.items():
            frame.forks.add(session=copy, from_session=session)
        for request in begins:
            frame.opens.add(
                session=request.session,
                prompt_tokens=len(request.prompt),
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                adapter=request.adapter,
                request_id=request.trace_id,
                from_session=request.from_session,
                from_tokens=request.num_cached,
            )
        _place(frame, requests)
        for request in requests:
            _add_slot(frame, request, request.prompt[request.num_sent : request.num_sent + num_tokens])
        return frame

    def rows(self, requests: Sequence[Request]) -> ring_pb2.Frame:
        """One token of each request."""
        requests = _in_order(requests)
        frame = self.frame(tuple(request.session for request in requests))
        _place(frame, requests)
        for request in requests:
            _add_slot(frame, request, request.known(request.num_sent, request.num_known))
        return frame

    def lone(self, request: Request, guesses: Sequence[int], match: int) -> ring_pb2.Frame:
        """The known tokens of one request that are due, and guesses; without known ones they go ahead."""
        is_alone = not self.in_flight
        known = request.known(request.num_sent, request.num_known)
        frame = self.frame((request.session,))
        request.place = BY_ITSELF
        window = _add_slot(frame, request, [*known, *guesses])
        assert window is not None
        window.num_draws, window.match = len(guesses) + bool(known), match
        window.is_ahead, window.is_alone = not known, is_alone
        if window.num_draws > 1:
            frame.slots[0].num_draws = window.num_draws
        return frame


def _in_order(requests: Sequence[Request]) -> list[Request]:
    """As the stages have their rows: the new come last."""
    return sorted(requests, key=lambda request: request.place)


def _place(frame: ring_pb2.Frame, requests: Sequence[Request]) -> None:
    """The rows of a frame, or one request by itself."""
    frame.is_batched = len(requests) > 1
    for row, request in enumerate(requests):
        request.place = (frame.seq, row) if frame.is_batched else BY_ITSELF


def _add_slot(frame: ring_pb2.Frame, request: Request, tokens: Sequence[int]) -> Window | None:
    """The request's next tokens; None: no token is drawn after them."""
    position = request.num_sent
    request.num_sent += len(tokens)
    request.num_read = request.num_sent
    request.num_in_flight += 1
    is_sampled = not request.is_prefilling and not request.is_pooled
    frame.slots.add(session=request.session, position=position, tokens=tokens, is_sampled=is_sampled)
    if not is_sampled:
        return None
    window = Window(position, tokens)
    request.windows.append(window)
    request.last_window = window
    return window

"""The one thread of a node that touches MLX: it loads the shard, runs frames, and turns arrays into bytes.

Everything reaches it through one queue, in order. Other threads only read its counters.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty

import mlx.core as mx

from cluster.draft_load import DraftLoad, load_drafter
from cluster.draft_queue import DraftEnd, DraftQueue, DraftWork, hand_over
from cluster.engine import Engine
from cluster.fault import Fault, injected, injected_text, overlaps_steps
from cluster.guide_process import GuideProcess
from cluster.inbox import Inbox
from cluster.memory_limits import MemoryLimits, apply_limits
from cluster.pace import Pace
from cluster.step_times import StepTimes
from cluster.trace_recorder import Kind, recorder
from cluster.work import LoadProgress, LoadWork, Running, StepWork, TrimWork, Work
from kernels.self_test import Report
from kernels.source import make_wrong
from planner.load_options import LoadOptions
from proto import ring_pb2
from proto.codec import Tensor
from shard_loader.adapters import load_adapters
from shard_loader.expert_kernels import choose_kernels, choose_more
from shard_loader.shard import Shard, ShardError
from shard_loader.sources import FetchStoppedError, HubError
from shard_loader.trim import trim_memory
from shard_loader.weights import WeightsError, load_shard

logger = logging.getLogger(__name__)

FETCH_AGAIN_S = 15.0
TEST_AFTER_S = 1.0  # with nothing to do, after which a class of kernels is tested
REST_S = 0.5  # with nothing to do, after which a device's freed buffers are given back


class ComputeThread:
    """Runs work in order and reports through callbacks, which it calls from its own thread.

    `on_output(frame, tensors)`: a frame for the next hop. `on_loaded(epoch)`, `on_failed(epoch, reason)`:
    how a load ended. `on_load_progress(loaded_bytes, total_bytes)`: how far it is.
    """

    def __init__(
        self,
        on_output: Callable[[ring_pb2.Frame, list[Tensor]], None],
        on_loaded: Callable[[int], None],
        on_failed: Callable[[int, str], None],
        on_load_progress: Callable[[int, int], None],
        *,
        overlaps: bool | None = None,
    ) -> None:
        self._overlaps = overlaps  # None: where the device is not the processor that builds
        self._delay_s = injected(Fault.STEP_DELAY_MS) / 1e3
        self._running: Running | None = None
        self._ended = self._due = 0.0  # perf_counter() when the last frame was done, and the device with it
        self._pace = Pace()
        self._on_output, self._on_loaded, self._on_failed = on_output, on_loaded, on_failed
        self._on_load_progress = on_load_progress
        self._inbox = Inbox()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._epoch = -1
        self._loaded: tuple[str, int, int, LoadOptions] | None = None
        self._last_load: LoadWork | None = None
        self._again: threading.Timer | None = None
        self._busy_since: float | None = None
        self._loaded_drafter: DraftLoad | None = None
        self.engine: Engine | None = None
        self.drafts: DraftQueue | None = None
        self.kernels: Report | None = None  # of the engine's shard
        self.limits = MemoryLimits()
        self.load, self.step_times = LoadProgress(), StepTimes()
        self.num_overlapped = 0  # frames that were built while the one before was computed
        self.progress, self.activity = 0, "idle"

    def start(self) -> None:
        """Call once."""
        self._thread.start()

    def post(self, work: Work) -> None:
        """Queue work; never blocks."""
        if isinstance(work, LoadWork):
            if self._last_load is not None:
                self._last_load.superseded.set()
            self._last_load = work
        self._inbox.put(work)

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to end; False if it was still computing after `timeout_s`."""
        if self._last_load is not None:
            self._last_load.superseded.set()
        if self._again is not None:
            self._again.cancel()
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def busy_s(self) -> float:
        """How long the present work has been running since it last made progress; 0 when idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _tick(self) -> None:
        self.progress += 1
        self._busy_since = time.monotonic()

    def _run(self) -> None:
        if self._overlaps is None:
            self._overlaps = overlaps_steps(mx.default_device().type == mx.gpu)
        while (work := self._next()) is not None:
            self._busy_since = time.monotonic()
            if isinstance(work, LoadWork):
                self._end_running()
                self.activity = "loading"
                began = time.perf_counter()
                self._load(work)
                if recorder.on:
                    recorder.add(Kind.LOADED, 0, began, time.perf_counter())
            elif isinstance(work, TrimWork):
                trim_memory()
            elif isinstance(work, (DraftWork, DraftEnd)):
                hand_over(work, self.drafts, self._epoch)
            else:
                self.activity = "computing"
                self._step(work)
            self.progress += 1
            if self._running is None:
                self._prepare(self.engine)
                self.activity, self._busy_since = "idle", None
            work = None  # a frame's bytes are not kept until the next one comes
        self._end_running()
        self._drop_engine()
        self.drafts = None

    def _drop_engine(self) -> None:
        if self.engine is not None and isinstance(self.engine.guides, GuideProcess):
            self.engine.guides.close()
        self.engine = self.kernels = None

    def _note_draft_bytes(self) -> None:
        """What the draft model's caches take is no scratch of the engine's steps."""
        if self.drafts is not None:
            self.drafts.note_bytes()
            if self.engine is not None:
                self.engine.memory.beside_bytes = self.drafts.kv_bytes

    def _next(self) -> Work | None:
        """What to do next; what runs is ended first where nothing else is there to do meanwhile.

        Until there is something, the draft model does one piece of its work after another, so that a frame
        never waits for more than a piece.
        """
        if (running := self._running) is not None and (engine := self.engine) and self._inbox.empty():
            work, begun = running.work, running.begun
            has_others = running.is_part or engine.num_sessions > len(running.sessions)
            is_due = not has_others and engine.ahead.is_due(self._pace.sure_s(work.frame, begun))
            if is_due or engine.shard.is_whole:  # a stage by itself never waits for a frame
                self._prepare(engine, is_busy=True)
            if has_others:
                with suppress(Empty):  # what comes while the device is busy is built meanwhile
                    return self._inbox.get(timeout=self._pace.sure_s(work.frame, begun))
            self._end_running()
            self.progress += 1
            self._prepare(engine)
            self.activity, self._busy_since = "idle", None
        while self._running is None and self.drafts:
            try:
                return self._inbox.get_nowait()
            except Empty:
                self.activity = "drafting"
                self._tick()
                began = time.perf_counter() if recorder.on else 0.0
                self.drafts.step()
                if began:
                    recorder.add(Kind.DRAFTED, 0, began, time.perf_counter())
                self._note_draft_bytes()
                self.activity, self._busy_since = "idle", None
        while self.engine is not None:
            has_spare = self.engine.has_spare
            if not has_spare and (self.kernels is None or not self.kernels.untested):
                break
            try:
                return self._inbox.get(timeout=REST_S if has_spare else TEST_AFTER_S)
            except Empty:
                self.engine.rest() if has_spare else self._test_kernels()
        return self._inbox.get()

    def _step(self, work: StepWork) -> None:
        """Run a frame, or begin it and end the one before."""
        before, frame = self._running, work.frame
        sessions = frozenset(slot.session for slot in frame.slots)
        is_plain = bool(sessions) and not (frame.opens or frame.closes or frame.keeps or frame.forks)
        is_next = before is not None and is_plain and before.is_followed_by(frame)
        if before is not None and not is_next and not (is_plain and before.sessions.isdisjoint(sessions)):
            self._end_running()
            before = None
        started = time.perf_counter()
        try:
            if frame.epoch != self._epoch or self.engine is None:
                work.release()
                return
            if (wanted := self.engine.waits_for(frame)) is not None:  # it comes again by itself
                wanted.add_done_callback(lambda _: self._inbox.put(work))
                return
            step = self.engine.begin(frame, work.tensors)
            started, begun = (min(s, self.engine.ahead.began) for s in (started, time.perf_counter()))
            if self._overlaps:
                step.start()
            if before is not None and is_next and (failure := before.step.wait()) is not None:
                step.fail(failure)
            running = Running(work, step, started, begun, time.perf_counter(), sessions)
            if recorder.on:
                numbers = len(frame.slots), sum(len(slot.tokens) for slot in frame.slots)
                recorder.add(Kind.BUILT, frame.seq, started, running.built, numbers=numbers)
        except Exception as error:  # border, as below
            self._give_up(work, error)
            return
        self.num_overlapped += before is not None
        self._end_running()
        self._running = running
        if not self._overlaps:
            self._end_running()

    def _end_running(self) -> None:
        """Wait for the frame that runs, and send what it comes to."""
        running, self._running = self._running, None
        if running is None:
            return
        work, started = running.work, max(running.started, self._ended)
        try:
            running.step.wait()
            if self._delay_s:  # stands for a device: it begins once it has its work and ended what it had
                self._due = max(running.built, self._due) + self._delay_s
                time.sleep(max(0.0, self._due - time.perf_counter()))
            self._pace.end(work.frame, running.begun)
            output = running.step.finish()
            if output is not None:
                self._on_output(*output)
                if self.engine is not None:
                    self.engine.count_sending(work.frame)
            work.release()
        except Exception as error:  # border: a frame that cannot even be read ends the epoch, not the node
            self._give_up(work, error)
        else:
            self._ended = time.perf_counter()
            self.step_times.add(work.frame, (self._ended - started) * 1e3)

    def _give_up(self, work: StepWork, error: Exception) -> None:
        logger.exception("frame %d of epoch %d failed", work.frame.seq, work.frame.epoch, exc_info=error)
        self._on_failed(work.frame.epoch, f"{type(error).__name__}: {error}")
        work.release()

    def _prepare(self, engine: Engine | None, *, is_busy: bool = False) -> None:
        """The time until the next frame comes, or while the device is busy, is used."""
        began = time.perf_counter() if recorder.on else 0.0
        is_free = self.drafts is None or not self.drafts.is_in_use
        while engine is not None and self._inbox.empty():
            if not (engine.build_ahead if is_busy else engine.prepare)(is_free=is_free):
                break
            if (awaited := engine.ahead.awaited(self._epoch)) is not None:
                self._inbox.expect(awaited)
            if began:
                recorder.add(Kind.AHEAD, 0, began, began := time.perf_counter())

    def _load(self, work: LoadWork) -> None:
        self._epoch, self.step_times, self._pace = work.epoch, StepTimes(), Pace()
        wanted = (work.model_digest, work.start, work.stop, work.options)
        what = f"layers {work.start}:{work.stop}"
        try:
            if work.need is not None:
                self.limits = apply_limits(work.need)
            if self.engine is not None:
                self.engine.drop_sessions()
            if self.drafts is not None:
                self.drafts.clear()
            if self._loaded != wanted:
                self._drop_engine()
                self._loaded = None
                gc.collect()
                trim_memory()
                if work.start < work.stop:
                    self._load_shard(work)
                self._loaded = wanted
            elif self.engine is not None:
                self.engine = Engine(self.engine.shard, self.engine.adapters, self.engine.guides)
            if self._loaded_drafter != work.drafter:
                what = "the draft model" + (f" {work.drafter.part.model}" if work.drafter is not None else "")
                self._load_drafter(work)
            self._on_loaded(work.epoch)
        except FetchStoppedError:
            logger.info("fetching %s was stopped", what)
        except HubError as error:
            logger.info("fetching %s failed", what, exc_info=True)
            self._on_failed(work.epoch, f"fetching {what} failed: {error}")
            self._fetch_again(work)
        except (ShardError, WeightsError) as error:  # about the files: the sentence says it all
            logger.info("loading %s failed", what, exc_info=True)
            self._on_failed(work.epoch, f"loading {what} failed: {error}")
        except Exception as error:  # border: the head learns why, and the node lives on
            logger.exception("loading %s failed", what)
            self._on_failed(work.epoch, f"loading {what} failed: {error}")

    def _load_drafter(self, work: LoadWork) -> None:
        """The draft model takes the place of the one that was here, after the layers, whose base it is."""
        self.drafts, self._loaded_drafter, wanted = None, None, work.drafter
        gc.collect()
        trim_memory()
        if wanted is not None:
            self.load = LoadProgress()
            folder = wanted.folder if wanted.fetch is None else self._fetch(work, wanted.fetch)
            self.drafts = DraftQueue(load_drafter(wanted, folder, self._on_progress))
        if self.engine is not None:
            self.engine.memory.rebase()
        self._loaded_drafter = wanted

    def _on_progress(self, loaded_bytes: int, total_bytes: int) -> None:
        self.load.loaded_bytes, self.load.total_bytes = loaded_bytes, total_bytes
        self._on_load_progress(loaded_bytes, total_bytes)
        self._tick()

    def _load_shard(self, work: LoadWork) -> None:
        self.load = LoadProgress()
        if delay_s := injected(Fault.LOAD_DELAY_S):
            time.sleep(delay_s)
        model_dir = work.model_dir if work.fetch is None else self._fetch(work, work.fetch)
        assert model_dir is not None
        mx.reset_peak_memory()
        shard = load_shard(
            model_dir,
            work.start,
            work.stop,
            options=work.options,
            cache=work.cache,
            on_progress=self._on_progress,
        )
        if work.kv is not None:
            shard.quantize_kv(work.kv)
        adapters = load_adapters(shard, work.adapters)
        self.kernels = self._choose_kernels(shard)
        trim_memory()
        self.engine = Engine(shard, adapters, GuideProcess(model_dir, shard.vocab_size))

    def _choose_kernels(self, shard: Shard) -> Report | None:
        self.activity = "testing kernels"
        if wrong := injected_text(Fault.WRONG_KERNEL):
            make_wrong(wrong)
        try:
            text = injected_text(Fault.KERNEL_BUDGET_S)
            return choose_kernels(shard, self._tick, budget_s=float(text) if text else None)
        finally:
            self.activity = "loading"

    def _test_kernels(self) -> None:
        """A class that the start had no time for; what comes meanwhile waits for a piece of it at most."""
        assert self.kernels is not None
        self.activity = "testing kernels"
        self._tick()
        choose_more(self.kernels, self._tick, lambda: not self._inbox.empty())
        self.activity, self._busy_since = "idle", None

    def _fetch(
        self, work: LoadWork, fetch: Callable[[Callable[[int, int], None], threading.Event], Path]
    ) -> Path:
        """The files that this load needs; each byte that comes is progress."""
        self.activity = "fetching"

        def on_progress(here_bytes: int, wanted_bytes: int) -> None:
            self.load.loaded_bytes, self.load.total_bytes = here_bytes, wanted_bytes
            self._tick()

        model_dir = fetch(on_progress, work.superseded)
        self.activity, self.load = "loading", LoadProgress()
        return model_dir

    def _fetch_again(self, work: LoadWork) -> None:
        """A hub comes back, a user logs in: what is missing is asked for again after a while."""

        def again() -> None:
            if self._last_load is work:
                self.post(replace(work, superseded=threading.Event()))

        self._again = threading.Timer(FETCH_AGAIN_S, again)
        self._again.daemon = True
        self._again.start()

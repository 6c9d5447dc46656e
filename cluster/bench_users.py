"""The users of `macrame bench`: a thread each, one request after another. Left at once when asked to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from cluster.bench_client import Answer, Endpoint
from cluster.errors import UserError

SHOW_INTERVAL_S = 0.25


def ask(
    endpoint: Endpoint,
    prompts: Sequence[Sequence[Sequence[int]]],
    num_tokens: int,
    answers: list[Answer],
    show: Callable[[], None] = lambda: None,
) -> None:
    """User i sends the requests of prompts[i], each when the one before is answered.

    `answers` gets each answer when it is asked for, so that it is there however this ends; `show()` is
    called again and again meanwhile. Raises the first user's UserError, or KeyboardInterrupt; by then all the
    other answers are broken off.
    """
    is_over = threading.Event()

    def user(own: Sequence[Sequence[int]]) -> None:
        for prompt in own:
            if is_over.is_set():
                return
            answer = Answer(len(prompt))
            answers.append(answer)
            try:
                endpoint.complete(prompt, num_tokens, answer)
            except UserError:
                if is_over.is_set():
                    return  # broken off here
                raise

    with ThreadPoolExecutor(len(prompts), thread_name_prefix="user") as threads:
        waiting = {threads.submit(user, own) for own in prompts}
        try:
            while waiting:
                done, waiting = wait(waiting, SHOW_INTERVAL_S, FIRST_EXCEPTION)
                for one in done:
                    one.result()
                show()
        finally:
            is_over.set()
            while waiting:  # one may have been about to send its request
                endpoint.leave()
                _, waiting = wait(waiting, SHOW_INTERVAL_S)

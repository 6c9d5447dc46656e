"""A real ring of three stages whose API wants a key, for the tests of other people's clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint

KEY = "sk-one"


@contextmanager
def serving_with_key(
    directory: Path, *, context: int, faults: Mapping[int, str] | None = None
) -> Iterator[str]:
    """The base URL, without /v1, of a healthy ring of the model `tiny`."""
    model = write_checkpoint("qwen3", directory / "tiny", num_layers=5)
    layers = [(0, 2), (2, 3), (3, 5)]
    env = {"MACRAME_API_KEYS": KEY}
    with RingProcesses(
        directory, model, layers, context=context, with_api=True, env=env, faults=faults
    ) as ring:
        yield ring.wait_api()

"""From files to a shard in memory: mlx-lm builds the whole model lazily; only own ones are evaluated.

mlx-lm does the class lookup, the sanitizing over the full dict of lazy tensors, and every form of
quantisation; this module checks the names, keeps what the shard reads, and loads it layer by layer, quantised
or cast on the way where that is asked for.
Threads: everything here runs on the calling thread, which must be the compute thread.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model

from planner.embedding_files import is_embedding_model
from planner.exl3 import refusal
from planner.headers import read_checkpoint
from planner.load_options import LoadOptions
from shard_loader.absent import Absent
from shard_loader.cache_io import CorruptEntryError, keeping
from shard_loader.exl3 import Exl3Weights
from shard_loader.inner_model import as_whole, drop_missing_head
from shard_loader.making import Making, Workshop
from shard_loader.origins import Origins
from shard_loader.shard import Shard
from shard_loader.shard_cache import CacheSettings, entry_key

# One evaluation loads at most this much at once (Metal ends command buffers of about 5 s), and never more
# than one layer: five would do for the watchdog, one keeps the progress bar honest and costs nothing.
MAX_GROUP_BYTES = 2 * 10**9

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
AS_IT_IS = LoadOptions()
Intake = Callable[[dict[str, mx.array]], dict[str, mx.array]]


class WeightsError(ValueError):
    """A checkpoint that does not make this model; one sentence that names the tensor or file."""


def load_shard(
    model_dir: Path,
    start: int,
    stop: int,
    *,
    options: LoadOptions = AS_IT_IS,
    cache: CacheSettings | None = None,
    on_progress: Progress | None = None,
) -> Shard:
    """Loads layers [start, stop) of the checkpoint in `model_dir`, with embedding or head where the range
    needs them.

    cache: where to keep what is made of the checkpoint, and to find it again; None: nowhere.
    on_progress(loaded_bytes, total_bytes) is called first with 0 and then after each piece. Raises
    planner.headers.ModelFilesError for a truncated file, WeightsError for a missing, unexpected or misshapen
    tensor, for own tensors of a file that is not here or of bytes not fetched, for an unknown architecture or
    options that do not suit the checkpoint, ShardError for a range that the model cannot be cut to.
    """
    shard, report = None, on_progress or (lambda loaded, total: None)
    try:
        shard = _load(model_dir, (start, stop), options, cache, report)
    except CorruptEntryError as error:
        logger.warning("a cache entry is removed and made again: %s", error)
    if shard is None:  # here, where the error and all that it holds are gone
        gc.collect()
        mx.clear_cache()
        shard = _load(model_dir, (start, stop), options, cache, report)
    shard.warm_up()
    mx.clear_cache()
    return shard


def _load(
    model_dir: Path,
    layers: tuple[int, int],
    options: LoadOptions,
    cache: CacheSettings | None,
    report: Progress,
) -> Shard:
    """The shard with all its parameters evaluated. Raises CorruptEntryError once the entry is removed."""
    absent = Absent(model_dir)
    model, workshop = build(model_dir, options, absent.intake)
    shard = Shard(model, *layers)
    groups = shard.ownership.groups
    if reason := absent.refusal(groups, *layers):
        raise WeightsError(reason)
    made = {
        name: array
        for group in groups
        for name, array in group.items()
        if (making := workshop.making_of(array)) is not None
        and (making.is_computed or (cache is not None and cache.is_on))
    }
    total_bytes, loaded_bytes = shard.footprint.total_bytes, 0
    report(0, total_bytes)
    with keeping(cache, made, total_bytes, lambda: entry_key(model_dir, layers, options)) as keeper:
        if keeper.is_reading:
            workshop.forget()
        for group in groups:
            for portion in _portions(group, workshop):
                if isinstance(portion, Making):
                    portion.make()
                    mx.clear_cache()  # its blocks have another size than the next one's
                    loaded_bytes += sum(array.nbytes for array in portion.outputs)
                else:
                    mx.eval(portion)
                    loaded_bytes += sum(array.nbytes for array in portion)
                report(loaded_bytes, total_bytes)
            keeper.take(group)
            mx.clear_cache()
    return shard


def load_lazily(model_dir: Path, *, intake: Intake | None = None) -> nn.Module:
    """The whole model with lazy parameters, exactly as mlx-lm builds it; nothing is read but headers.

    `intake` is given the lazy tensors as they come from the files, and gives those that mlx-lm gets. Raises
    WeightsError as `load_shard` does.
    """
    return build(model_dir, AS_IT_IS, intake)[0]


def build(model_dir: Path, options: LoadOptions, intake: Intake | None = None) -> tuple[nn.Module, Workshop]:
    """The whole lazy model with `options` applied, and how its parameters are made. As `load_lazily`."""
    checkpoint = read_checkpoint(model_dir)
    origins = Origins(model_dir, checkpoint.headers)
    names = [*chain(checkpoint.headers, *checkpoint.missing.values())]

    def checked_classes(config: dict[str, Any]) -> tuple[type, type]:
        if reason := refusal(config, names, str(model_dir)):
            raise WeightsError(reason)
        model_class, args_class = _get_classes(config=config)
        attributes = {
            "__module__": model_class.__module__,
            "origins": origins,
            "intake": staticmethod(intake or dict),
            "is_embedding": is_embedding_model(model_dir),
        }
        return type(model_class.__name__, (_Checked, model_class), attributes), args_class

    workshop = Workshop(origins)
    try:
        model, config = load_model(model_dir, lazy=True, strict=False, get_model_classes=checked_classes)
        if isinstance(model, _Checked):
            model.__class__ = type(model).__bases__[1]
        workshop.prepare(model, config, options)
    except WeightsError:
        raise
    except KeyError as error:  # an architecture's sanitize asks for the tensors it rearranges
        raise WeightsError(f"{model_dir}: the checkpoint has no tensor {error.args[0]!r}") from error
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise WeightsError(f"{model_dir}: {' '.join(str(error).split())}") from error
    return model, workshop


class _Checked:
    """Mixed into a model's class while it is loaded: its parameters and the weights must match."""

    origins: Origins
    intake: Intake
    is_embedding: bool  # the head may be missing, and the inner part's names be all there are

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """What mlx-lm calls first: every tensor passes `intake`, whether or not the model sanitizes.

        EXL3 weights are seen by the model as plain ones, and get their own modules here.
        """
        own = getattr(super(), "sanitize", dict)
        taken = self.intake(weights)
        exl3 = Exl3Weights(taken)

        def sanitized(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
            plain = tensors if exl3.is_empty else exl3.plain(tensors)
            clean = own(as_whole(self, plain) if self.is_embedding else plain)
            if not exl3.is_empty:
                clean = exl3.install(self, clean, self.origins)
            if self.is_embedding:
                drop_missing_head(self, clean)
            return clean

        return self.origins.watch(sanitized, taken)

    def load_weights(self: Any, file_or_weights: list[tuple[str, mx.array]], strict: bool = True) -> Any:
        weights = dict(file_or_weights)
        parameters = dict(tree_flatten(self.parameters()))
        _check_names(parameters.keys() - weights.keys(), weights.keys() - parameters.keys())
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                raise WeightsError(
                    f"tensor {name!r} has the shape {tuple(weights[name].shape)}; the config asks for "
                    f"{tuple(parameter.shape)}"
                )
        self.origins.keep(weights)
        return super().load_weights(file_or_weights, strict=False)  # type: ignore[misc]


def _check_names(missing: set[str], unexpected: set[str]) -> None:
    for names, what in ((missing, "the checkpoint lacks"), (unexpected, "the model has no place for")):
        if names:
            first = sorted(names)[0]
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise WeightsError(f"{what} tensor {first!r}{others}")


def _portions(group: Mapping[str, mx.array], workshop: Workshop) -> Iterator[list[mx.array] | Making]:
    """One layer's arrays in portions to evaluate together.

    What lies in the files as it is goes together. What is computed (stacked experts, dequantised blocks,
    quantised or cast weights) goes one by one, so that what it is made of is in memory for no more than one
    at a time.
    """
    together: list[mx.array] = []
    together_bytes = 0
    seen: set[int] = set()
    for array in group.values():
        making = workshop.making_of(array)
        if making is not None:
            if id(making) not in seen:
                seen.add(id(making))
                yield making
            continue
        if together and together_bytes + array.nbytes > MAX_GROUP_BYTES:
            yield together
            together, together_bytes = [], 0
        together.append(array)
        together_bytes += array.nbytes
    if together:
        yield together

"""A module whose call is another for a while: only its class changes.

A copy of it, deep or pickled, has its own class again: what is remembered of the module is not the copy's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx import nn


def take_call(module: nn.Module, call: Callable[..., Any], **more: Any) -> None:
    """From now on `call` is what the module does. more: attributes of the class that it has then."""
    base: Any = type(module)

    def reduce(self: Any, _: Any) -> tuple[Any, ...]:
        _, _, *state = base.__reduce_ex__(self, 4)
        return _new, (base,), *state

    content = {"__call__": call, "__reduce_ex__": reduce, **more}
    module.__class__ = type(base.__name__, (base,), content)


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


def give_back(module: nn.Module) -> None:
    """The opposite of `take_call`."""
    module.__class__ = own_class(module)


def own_class(module: nn.Module) -> Any:
    """The class of a taken module before it was taken."""
    return type(module).__bases__[0]

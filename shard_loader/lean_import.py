"""Imports mlx-lm without its tokenizers and its generator, which a node has no use for.

`import mlx_lm` runs both, and they bring transformers, which looks through the files of every architecture
that it knows: as long as the rest of a node's start. Tokens are made of text in the HTTP process; a node
computes. What is left out comes with its first use, so whoever asks mlx_lm for anything of it gets it.
Threads: `import_lean` is for the main thread, before another one imports mlx-lm.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

PACKAGE = "mlx_lm"
TOKENIZERS = "mlx_lm.tokenizer_utils"


class _Later(ModuleType):
    """A package that runs its own first lines when it is asked for something that only they define."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # what Python itself asks of any module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        with ExitStack() as failed:
            failed.callback(setattr, self, "__class__", _Later)
            self.__class__ = ModuleType  # type: ignore[assignment]  # its own lines ask it for names, too
            self.__spec__.loader.exec_module(self)
            failed.pop_all()
        return getattr(self, name)


def import_lean() -> None:
    """Imports mlx_lm.utils, from where models are loaded; does nothing where mlx-lm has been imported before.

    A version of mlx-lm that cannot be taken apart so is left to be imported as it wants to be.
    """
    if PACKAGE in sys.modules or (spec := find_spec(PACKAGE)) is None:
        return
    package = module_from_spec(spec)
    package.__class__ = _Later
    sys.modules[PACKAGE] = package
    sys.modules[TOKENIZERS] = _stand_in()
    try:
        importlib.import_module("mlx_lm.utils")
    except ImportError:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
    sys.modules.pop(TOKENIZERS, None)


def _stand_in() -> ModuleType:
    """What mlx_lm.utils wants of the tokenizers: a class for its annotations, and how one is loaded."""

    def load(*args: Any, **named: Any) -> Any:
        return importlib.import_module(TOKENIZERS).load(*args, **named)

    module = ModuleType(TOKENIZERS)
    vars(module).update(TokenizerWrapper=type("TokenizerWrapper", (), {}), load=load)
    return module

"""`proto` and `kernels` are also names of other packages; this checks that the imported ones are ours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cluster.errors import EXIT_ERROR, UserError

_MARKS = {"proto": "ring.proto", "kernels": "__init__.py", "planner": "solver.py", "shard_loader": "shard.py"}
OWN_PACKAGES = (*_MARKS, "cluster", "deploy")


def check_packages() -> None:
    """Raise UserError with one sentence if a package of ours is hidden by another of the same name."""
    for sentence in hidden_packages():
        raise UserError(sentence, EXIT_ERROR)


def hidden_packages() -> list[str]:
    """A sentence for each package of ours that is missing, or hidden by another of the same name."""
    root = Path(__file__).resolve().parent.parent
    found = []
    for name, mark in _MARKS.items():
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            found.append(f"the package {name!r} of macrame is missing; install macrame again")
            continue
        folder = Path(spec.origin).resolve().parent
        if folder.parent != root or not (folder / mark).exists():
            found.append(
                f"another package named {name!r} in {folder} hides macrame's; install macrame in an "
                "environment of its own"
            )
    return found

"""mlx-lm without its tokenizers: what is left out, and that it is there for whoever asks for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cluster.versions import mlx_lm_version
from tests.tiny_models import write_tokenizer

ROOT = Path(__file__).parent.parent
LEAN = "import sys; from shard_loader.lean_import import import_lean; import_lean(); "


def told(code: str, *arguments: str, before: str = "") -> list[str]:
    """The words that a process prints that has imported mlx-lm so."""
    run = subprocess.run(
        [sys.executable, "-c", before + LEAN + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.split()


def test_what_a_node_runs_is_imported_without_tokenizers() -> None:
    code = (
        "import cluster.runtime; from mlx_lm.models import cache, llama; "
        "print(*{'mlx_lm.utils', 'mlx_lm.models.llama', 'mlx_lm.tokenizer_utils', 'mlx_lm.generate', "
        "'transformers'} & set(sys.modules))"
    )
    assert sorted(told(code)) == ["mlx_lm.models.llama", "mlx_lm.utils"]


def test_what_is_left_out_comes_when_it_is_asked_for(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    code = (
        "import mlx_lm, pathlib; from mlx_lm.utils import load_tokenizer; "
        "print(mlx_lm.__version__, 'mlx_lm.generate' in sys.modules, hasattr(mlx_lm, 'no_such_name')); "
        "from mlx_lm import generate, load; from mlx_lm.tokenizer_utils import TokenizerWrapper; "
        "tokenizer = load_tokenizer(pathlib.Path(sys.argv[1])); "
        "print(isinstance(tokenizer, TokenizerWrapper), type(mlx_lm).__name__)"
    )
    words = told(code, str(tmp_path))
    assert words == [mlx_lm_version(), "True", "False", "True", "module"]


def test_what_was_imported_before_stays_as_it_is() -> None:
    before = "import sys, types; sys.modules['mlx_lm'] = given = types.ModuleType('mlx_lm'); "
    code = "print(sys.modules['mlx_lm'] is given, type(given).__name__, 'mlx_lm.utils' in sys.modules)"
    assert told(code, before=before) == ["True", "module", "False"]


def test_an_mlx_lm_that_is_put_together_in_another_way_is_imported_as_it_wants() -> None:
    code = (
        "left = [name for name in sys.modules if name.startswith('mlx_lm')]; "
        "import mlx_lm.utils; print(left, type(mlx_lm).__name__, 'transformers' in sys.modules)"
    )
    # What mlx_lm.utils asks of the tokenizers besides
    other = (
        "import shard_loader.lean_import as lean, types; "
        "lean._stand_in = lambda: types.ModuleType(lean.TOKENIZERS); "
    )
    assert told(code, before=other) == ["[]", "module", "True"]

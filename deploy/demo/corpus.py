"""The demo model's text: the running Python's standard library, as token documents; pure CPU work, no MLX."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import random
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
HELD_OUT_ONE_IN = 20

# Tables, generated files and other people's packages; none of them reads like Python written by hand.
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "encodings", "pydoc_data", "ensurepip"}
SKIPPED_PREFIXES = ("_sysconfigdata", "lib2to3/tests/data/", "config-")

# A newline is always a token of its own and so is a line's indentation: a prompt may then end before, at or
# after either and still be cut as the training text was. Digits stay single, identifiers keep underscores.
PIECES = r"\n|(?<=\n)[ \t]+| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|[^\S\n]+(?!\S)|[^\S\n]+"

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token streams; every document ends with END_OF_TEXT_ID.

    `train`: (num_train_tokens,) files and single functions, shuffled. `train_starts`: where a document starts
    in it. `train_files`: (num_file_tokens,) the same files alone, for count-based baselines. `held_out`:
    (num_held_out_tokens,) whole files that no training document comes from. `facts`: counts for the README.
    """

    train: Tokens
    train_starts: npt.NDArray[np.int64]
    train_files: Tokens
    held_out: Tokens
    facts: dict[str, int | str]

    def save(self, path: Path) -> None:
        arrays = {name: getattr(self, name) for name in ("train", "train_starts", "train_files", "held_out")}
        np.savez_compressed(path, facts=np.array(json.dumps(self.facts)), **arrays)

    @staticmethod
    def load(path: Path) -> Corpus:
        with np.load(path) as data:
            facts = json.loads(str(data["facts"]))
            return Corpus(data["train"], data["train_starts"], data["train_files"], data["held_out"], facts)


def read_sources(root: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """Path below `root` -> text of every distinct, valid Python file of the library, in sorted order.

    Only of those whose path is_wanted.
    """
    sources: dict[str, str] = {}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(name.split("/")) or name.startswith(SKIPPED_PREFIXES) or not is_wanted(name):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read().strip("\n") + "\n"
            ast.parse(text)
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            continue  # the library's tests hold files that are wrong on purpose
        if len(text) > 1 and text not in seen:
            seen.add(text)
            sources[name] = text
    return sources


def is_held_out(name: str) -> bool:
    """Whether the file `name` is kept from training: decided by its path alone, so that it never moves."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def functions_of(text: str) -> Iterator[str]:
    """Each function of a file as a text of its own: what a prompt `def f(n):` asks for.

    Without its indentation, and without its docstring, so that such a prompt is answered with code. Test
    methods are left out: they would be most of it.
    """
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("test"):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        body = lines[first : node.end_lineno]
        if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1:
            docstring, code = node.body[0].lineno - 1 - first, node.body[1].lineno - 1 - first
            body = body[:docstring] + body[code:]
        margin = " " * node.col_offset
        if len(body) < 3 or any(line.strip() and not line.startswith(margin) for line in body):
            continue
        function = "".join(line[node.col_offset :] if line.strip() else "\n" for line in body)
        try:
            ast.parse(function)
        except SyntaxError:  # `node.col_offset` counts bytes; a name before it may not be ASCII
            continue
        yield function.strip("\n") + "\n"


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries; id 0 is END_OF_TEXT.

    Raises ValueError if the texts are too small for so many entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, fewer than vocab_size {vocab_size}"
        )
    return tokenizer


def _documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    encoded = tokenizer.encode_batch(list(texts))
    return [np.array([*piece.ids, END_OF_TEXT_ID], dtype=np.uint16) for piece in encoded]


def build_corpus(vocab_size: int, root: Path | None = None, seed: int = 0) -> tuple[Corpus, Tokenizer]:
    """Read the library below `root` (default: the running Python's), train a tokenizer and encode it."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    sources = read_sources(root)
    held_out = {name: text for name, text in sources.items() if is_held_out(name)}
    train = {name: text for name, text in sources.items() if name not in held_out}
    known = {function for text in held_out.values() for function in functions_of(text)}
    functions = sorted({function for text in train.values() for function in functions_of(text)} - known)

    tokenizer = train_tokenizer(list(train.values()), vocab_size)
    files = _documents(tokenizer, list(train.values()))
    documents = files + _documents(tokenizer, functions)
    random.Random(seed).shuffle(documents)
    ends = np.cumsum([len(document) for document in documents])
    corpus = Corpus(
        train=np.concatenate(documents),
        train_starts=np.concatenate([[0], ends[:-1]]).astype(np.int64),
        train_files=np.concatenate(files),
        held_out=np.concatenate(_documents(tokenizer, list(held_out.values()))),
        facts={
            "python": platform.python_version(),
            "num_train_files": len(train),
            "train_bytes": sum(len(text.encode()) for text in train.values()),
            "num_functions": len(functions),
            "num_held_out_files": len(held_out),
            "held_out_bytes": sum(len(text.encode()) for text in held_out.values()),
        },
    )
    return corpus, tokenizer

"""The tokenizer: ids as transformers makes them, text as transformers decodes it, never half a character."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from cluster.detokenizer import MAX_PENDING_TOKENS, WindowDetokenizer
from cluster.tokenizer import ChatError, Tokenizer, TokenizerError, load_tokenizer
from tests.tiny_models import BOS_ID, EOS_ID, write_tokenizer

TEXT = "def f(x):\n    return x + 1  # naïve café, 漢字 and 😀😀\n" * 20


@pytest.fixture(scope="module")
def byte_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with merges, two special tokens and a chat template."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens(["<é added>"])
    return save(tmp_path_factory.mktemp("byte"), backend, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def spm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece-like BPE with byte fallback, as Llama 2 has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "é"]
    backend = Backend(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return save(tmp_path_factory.mktemp("spm"), backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def word_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-piece tokenizer, whose decoder joins words by rules of its own."""
    words = ["[UNK]", "[SEP]", "token", "##izer", "is", "fine", "the"]
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens(["[SEP]"])
    return save(tmp_path_factory.mktemp("word"), backend, eos_token="[SEP]")


def save(directory: Path, backend: Backend, **settings: Any) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    return directory


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.add(token) for token in tokens), detokenizer.flush()]


# -- text to ids -------------------------------------------------------------------------------------


def test_ids_are_those_of_transformers(byte_dir: Path) -> None:
    reference = AutoTokenizer.from_pretrained(byte_dir)
    tokenizer = load_tokenizer(byte_dir)
    for text in (TEXT, "", "<|end|>x", "a\u0000b", " "):
        assert tokenizer.encode(text) == reference.encode(text)


def test_a_special_token_in_a_text_is_that_token(byte_dir: Path) -> None:
    tokenizer = load_tokenizer(byte_dir)
    assert tokenizer.encode("<|im_end|>") == [1]
    assert tokenizer.decode([1]) == "<|im_end|>"
    assert tokenizer.decode([1], skip_special=True) == ""


def test_threads_may_share_a_tokenizer(byte_dir: Path, tmp_path: Path) -> None:
    content = json.loads((byte_dir / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((byte_dir / name).read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.warm_up()
    wanted = tokenizer.encode(TEXT)
    assert len(wanted) > 4
    with ThreadPoolExecutor(8) as pool:
        assert all(tokens == wanted for tokens in pool.map(lambda _: tokenizer.encode(TEXT), range(64)))


def test_end_of_text_ids_come_from_all_places(byte_dir: Path, tmp_path: Path) -> None:
    assert load_tokenizer(byte_dir).eos_ids == {0, 1}
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert load_tokenizer(tmp_path).eos_ids == {4, 5, EOS_ID}


def test_a_chat_goes_through_the_models_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.encode_chat(messages) == [BOS_ID, 259, *b"hi", 260]
    assert tokenizer.encode_chat(messages, add_generation_prompt=False) == [BOS_ID, 259, *b"hi"]
    assert tokenizer.template_mentions("role")
    assert not tokenizer.template_mentions("developer")


def test_without_a_template_there_is_no_chat(byte_dir: Path) -> None:
    tokenizer = load_tokenizer(byte_dir)
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatError, match=r"^The model has no chat template; use /v1/completions\.$"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_a_template_that_refuses_says_why(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ChatError, match="refuses these messages: roles must alternate"):
        load_tokenizer(tmp_path).encode_chat([{"role": "user", "content": "hi"}])


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TokenizerError, match=f"^The tokenizer in {tmp_path} cannot be read: "):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"config\.json is not valid JSON"):
        load_tokenizer(tmp_path)


# -- ids to text -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 400), max_size=30))
def test_byte_level_text_is_that_of_transformers(byte_dir: Path, tokens: list[int]) -> None:
    tokenizer, reference = cached(load_tokenizer, byte_dir), cached(AutoTokenizer.from_pretrained, byte_dir)
    tokens = [token for token in tokens if token < tokenizer.size]
    assert tokenizer.decode(tokens) == reference.decode(tokens)
    assert tokenizer.decode(tokens, skip_special=True) == reference.decode(tokens, skip_special_tokens=True)
    assert b"".join(map(tokenizer.piece, tokens)).decode("utf-8", "replace") == reference.decode(tokens)


@given(st.text("ab é漢😀", max_size=12))
def test_byte_fallback_text_comes_back(spm_dir: Path, text: str) -> None:
    tokenizer = cached(load_tokenizer, spm_dir)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == (" " + text if text else "")  # the answer's own first space stays


@given(st.text("aé漢😀 \n", max_size=20))
def test_no_piece_holds_half_a_character(byte_dir: Path, text: str) -> None:
    tokenizer = cached(load_tokenizer, byte_dir)
    shown = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)


def test_an_unfinished_character_shows_at_the_end_only(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert pieces(tokenizer, list("€".encode()[:2])) == ["", "", "\ufffd"]
    assert pieces(tokenizer, [0xE2, 0x82, 0x41]) == ["", "", "\ufffdA", ""]


def test_an_id_without_a_token_is_no_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.piece(319) == b""
    assert tokenizer.decode([0x41, 319, 0x42]) == "AB"


def test_other_decoders_go_through_a_window(word_dir: Path) -> None:
    tokenizer = load_tokenizer(word_dir)
    assert isinstance(tokenizer.detokenizer(), WindowDetokenizer)
    tokens = tokenizer.encode("the tokenizer is fine")
    assert pieces(tokenizer, tokens) == ["the", " token", "izer", " is", " fine", ""]
    continued = tokenizer.detokenizer(tokens[:1])
    assert [continued.add(token) for token in tokens[1:]] == [" token", "izer", " is", " fine"]
    assert tokenizer.piece(2) == b"token"


@given(st.text("aé漢😀 ", max_size=20))
def test_a_window_loses_nothing(byte_dir: Path, text: str) -> None:
    reference = cached(AutoTokenizer.from_pretrained, byte_dir)
    window = WindowDetokenizer(reference.decode)
    shown = [window.add(token) for token in reference.encode(text)]
    assert "".join(shown) + window.flush() == text
    assert not any("\ufffd" in piece for piece in shown)


def test_a_window_does_not_wait_for_ever_for_a_character() -> None:
    window = WindowDetokenizer(lambda ids: "\ufffd" * len(ids))
    shown = [window.add(i) for i in range(MAX_PENDING_TOKENS + 1)]
    assert shown == [""] * MAX_PENDING_TOKENS + ["\ufffd" * (MAX_PENDING_TOKENS + 1)]


def test_loading_a_tokenizer_imports_no_mlx(byte_dir: Path) -> None:
    code = (
        "import sys, pathlib; from cluster.tokenizer import load_tokenizer;"
        "load_tokenizer(pathlib.Path(sys.argv[1]));"
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'torch')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(byte_dir)], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"


_CACHE: dict[Any, Any] = {}


def cached(make: Callable[[Path], Any], path: Path) -> Any:
    """One object for all examples of a property."""
    key = (make, path)
    if key not in _CACHE:
        _CACHE[key] = make(path)
    return _CACHE[key]

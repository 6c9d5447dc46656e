"""The model's tokenizer: text and chats to ids, ids to bytes. No evaluation; threads may share it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer

logger = logging.getLogger(__name__)

_SPM_DECODERS = ("Replace", "ByteFallback", "Fuse")
_SPACE = "▁"
# What templates raise besides jinja2's errors; those of mlx-lm are Python
_REFUSALS = (TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError)


class TokenizerError(ValueError):
    """The folder has no usable tokenizer; the message says which folder and why."""


class ChatError(ValueError):
    """The chat cannot be rendered: no template, or the template refuses these messages."""


class Tokenizer:
    """A Hugging Face tokenizer with what serving needs. Made by `load_tokenizer`."""

    def __init__(
        self,
        hf: Any,
        eos_ids: frozenset[int],
        render: Any = None,
        *,
        tool_parser: str | None = None,
        response_format: str | None = None,
    ) -> None:
        self._hf = hf
        self._render = render
        self.tool_parser = tool_parser  # a module of mlx_lm.tool_parsers, where the model's files name it
        self.response_format = response_format  # likewise, a module of mlx_lm.chat_templates
        self.eos_ids = eos_ids
        self.size = len(hf)
        added = getattr(hf, "added_tokens_decoder", {})
        self.added_ids = {str(token): i for i, token in added.items()}  # not of the text's own vocabulary
        self.special_ids = frozenset(hf.all_special_ids) | {i for i, t in added.items() if t.special}
        self._decoder = _decoder_kind(hf)
        self._pieces: dict[int, bytes] = {}
        self.max_token_chars = max((len(token) for token in hf.get_vocab()), default=1)

    @property
    def hf(self) -> Any:
        """The tokenizer of transformers."""
        return self._hf

    # -- text to ids -------------------------------------------------------------------------

    @property
    def has_chat_template(self) -> bool:
        return self._render is not None or self._hf.chat_template is not None

    @property
    def template(self) -> str:
        """The chat template's text; that of all templates, where there are several."""
        template = self._hf.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or ""

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return self._render is not None or re.search(r"\btools\b", self.template) is not None

    @property
    def takes_arguments_as_text(self) -> bool:
        """Whether the template is known to read the arguments of a call as JSON text, not as an object."""
        return self._render is not None

    @property
    def vocab(self) -> Mapping[str, int]:
        """The id of each token."""
        return self._hf.get_vocab()  # type: ignore[no-any-return]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens written out in it become those tokens, as in transformers."""
        return list(self._hf.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a chat rendered by the model's own template; raises ChatError with the template's reason."""
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise ChatError("The model has no chat template; use /v1/completions.")
        args = dict(template_args or {})
        reserved = args.keys() & inspect.signature(self._hf.apply_chat_template).parameters.keys()
        if reserved:
            raise ChatError(f"chat_template_kwargs: {min(reserved)} is not supported.")
        if tools:
            args["tools"] = list(tools)
        if documents:
            args["documents"] = list(documents)
        try:
            if self._render is not None:
                text = self._render(
                    list(messages),
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **args,
                )
                return self.encode(text, add_special_tokens=False)
            ids = self._hf.apply_chat_template(
                list(messages),
                tokenize=True,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                return_dict=False,
                **args,
            )
        except (TemplateError, *_REFUSALS) as error:
            logger.info("the chat template refused a request", exc_info=True)
            raise ChatError(f"The model's chat template refuses these messages: {error}") from error
        return list(ids)

    def warm_up(self) -> None:
        """Compiles the template, and settles what the tokenizer changes in itself at its first use.

        After that no call changes it, so that threads may share it.
        """
        self.encode("warm up")
        if self.has_chat_template:
            with contextlib.suppress(ChatError):
                self.encode_chat([{"role": "user", "content": "warm up"}])

    def template_mentions(self, word: str) -> bool:
        """Whether the chat template names `word` (a role, a key): if not, it cannot act on it."""
        return word in self.template

    # -- ids to text -------------------------------------------------------------------------

    def piece(self, token: int) -> bytes:
        """The bytes of `token`: its text, a special token's name, or nothing if unused."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._make_piece(token)
        return found

    def decode(self, tokens: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `tokens`."""
        detokenizer = self.detokenizer(skip_special=skip_special)
        return "".join([detokenizer.add(token) for token in tokens]) + detokenizer.flush()

    def detokenizer(
        self,
        context: Sequence[int] = (),
        *,
        skip_special: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> Detokenizer:
        """A fresh incremental detokenizer of an answer that follows the tokens `context`.

        `skip_special` leaves out the special tokens but `shown_ids`.
        """
        skipped = self.special_ids - shown_ids if skip_special else frozenset()
        if self._decoder:
            return ByteDetokenizer(self.piece, skipped)

        def decode(ids: Sequence[int]) -> str:
            known = [token for token in ids if token < self.size and token not in skipped]
            return str(self._hf.decode(known))

        return WindowDetokenizer(decode, context)

    def _make_piece(self, token: int) -> bytes:
        text = self._hf.convert_ids_to_tokens(token) if token < self.size else None
        if text is None:
            return b""
        if token in self.special_ids or not self._decoder:
            return (text if token in self.special_ids else str(self._hf.decode([token]))).encode()
        if self._decoder == "spm":
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes.fromhex(text[3:5])
            return str(text).replace(_SPACE, " ").encode()
        try:
            return bytes([_BYTE_OF_CHAR[char] for char in text])
        except KeyError:  # an added token is kept as it is written
            return str(text).encode()


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """Reads the tokenizer of a model folder as mlx-lm does; raises TokenizerError.

    End-of-text ids: those of generation_config.json, else of config.json, and the tokenizer's own.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config = _read_json(model_dir / "config.json")
    settings = _read_json(model_dir / "tokenizer_config.json")
    defaults: dict[str, Any] = {}
    if _needs_mlx_lm(config, settings):
        utils = importlib.import_module("mlx_lm.utils")
        defaults = utils._tokenizer_defaults(model_dir) or {}
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise TokenizerError(
            f"The tokenizer in {model_dir} cannot be read: {' '.join(str(error).split())}"
        ) from error
    eos = _read_json(model_dir / "generation_config.json").get("eos_token_id") or config.get("eos_token_id")
    if eos is None:
        eos = defaults.get("eos_token_ids")
    eos_ids = {eos} if isinstance(eos, int) else set(eos or ())
    if hf.eos_token_id is not None:
        eos_ids.add(hf.eos_token_id)
    return Tokenizer(
        hf,
        frozenset(eos_ids),
        _own_template(hf, settings, defaults),
        tool_parser=settings.get("tool_parser_type", defaults.get("tool_parser_type")),
        response_format=settings.get("chat_template_type", defaults.get("chat_template_type")),
    )


def _needs_mlx_lm(config: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether mlx-lm has more to say about this tokenizer than its files: importing it takes a second."""
    return (
        "chat_template_type" in settings
        or settings.get("tokenizer_class") == "NewlineTokenizer"
        or config.get("model_type") == "muse_spark"
    )


def _own_template(hf: Any, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    kind = settings.get("chat_template_type", defaults.get("chat_template_type"))
    if kind is None or ("chat_template_type" not in settings and hf.chat_template is not None):
        return None
    return importlib.import_module(f"mlx_lm.chat_templates.{kind}").apply_chat_template


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _decoder_kind(hf: Any) -> str:
    """ "bytes", "spm" or "" (neither): how the tokenizer's decoder turns tokens into text."""
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return ""
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = tuple(step.get("type") for step in steps)
    if kinds == ("ByteLevel",):
        return "bytes"
    # The trailing Strip of the sentencepiece form drops the space before a text's first word;
    # an answer continues a text, so that space stays.
    is_spm = kinds in (_SPM_DECODERS, (*_SPM_DECODERS, "Strip"))
    if is_spm and steps[0] == {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}:
        return "spm"
    return ""


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (github.com/openai/gpt-2, src/encoder.py)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in kept}
    rest = [byte for byte in range(256) if byte not in set(kept)]
    table.update({chr(256 + place): byte for place, byte in enumerate(rest)})
    return table


_BYTE_OF_CHAR = _byte_of_char()

"""How the served model marks reasoning and tool calls, found once from its tokenizer. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from cluster.api.harmony import TOKENS as HARMONY_TOKENS
from cluster.api.harmony import HarmonyReader
from cluster.api.message_reader import Edges, MessageReader, State, Syntax
from cluster.api.parts import PartReader
from cluster.api.reasoning import ThinkMarkers, find_think_markers, has_begun
from cluster.api.tool_families import FAMILIES, ToolFamily, find_family
from cluster.api.tools import ToolUse
from cluster.tokenizer import Tokenizer

# mlx_lm/chat_templates/muse_spark.py, RESPONSE_FORMAT: each message of an answer has a header.
_MUSE_EDGES: Edges = (
    (State.HEADER, "to=self<|message|>", State.REASONING),
    (State.HEADER, "to=user<|message|>", State.CONTENT),
    (State.HEADER, "to=commentary<|message|>", State.CONTENT),
    (State.HEADER, "<atem:function_calls>", State.CALL),
    (State.REASONING, "<|eom|>", State.HEADER),
    (State.CONTENT, "<|eom|>", State.HEADER),
    (State.CONTENT, "<|eot|>", State.CONTENT),
)
# mlx_lm/tokenizer_utils.py, _infer_structural_markers
_KIMI_K3_EDGES: Edges = (
    (State.CONTENT, "<|open|>response<|sep|>", State.CONTENT),
    (State.CONTENT, "<|close|>response<|sep|>", State.CONTENT),
    (State.CONTENT, "<|close|>message<|sep|>", State.CONTENT),
)


_TAIL_TOKENS = 16  # of a prompt, where its template may have begun the reasoning

Reading = tuple[Callable[[], PartReader] | None, frozenset[int]]


class ModelSyntax:
    """Makes the readers of one model's answers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        vocab = tokenizer.vocab
        # Llama's refuses the chat that goes on after several; so does gpt-oss's, or forgets all but the first
        self._is_single = "only supports single tool-calls" in tokenizer.template
        self.added_ids = tokenizer.added_ids
        self.is_harmony = all(token in vocab for token in HARMONY_TOKENS)
        self.family = find_family(tokenizer.tool_parser, tokenizer.template, vocab)
        if not tokenizer.takes_tools:  # then a message explains them, in this notation
            self.family = FAMILIES["json_tools"]
        edges, initial = _edges(tokenizer, self.family)
        self._with_tools = Syntax(find_think_markers(vocab), self.family, edges, initial)
        self._without_tools = replace(self._with_tools, family=None)
        special = {name: token for name, token in vocab.items() if token in tokenizer.special_ids}
        self._shown = {
            syntax: _within(syntax.markers(), special) for syntax in (self._with_tools, self._without_tools)
        }
        self._harmony_ids = frozenset(vocab[token] for token in HARMONY_TOKENS if self.is_harmony)

    @property
    def think(self) -> ThinkMarkers | None:
        """What stands around the model's reasoning."""
        return self._with_tools.think

    @property
    def has_headers(self) -> bool:
        """Whether an answer's messages have headers, as those of muse_spark."""
        return self._with_tools.initial is State.HEADER

    def prompt_end(self, prompt: Sequence[int], begun: str | None) -> str:
        """The text that an answer follows, as far as it says whether reasoning has begun."""
        return self._tokenizer.decode(prompt[-_TAIL_TOKENS:]) if begun is None else begun

    def reading(self, use: ToolUse, prompt: Sequence[int], *, begun: str | None = None) -> Reading:
        """What makes a reader of answers to `prompt`, or None, and the special tokens that it must see.

        `begun` is the answer's beginning, where the prompt ends with it.
        """
        max_calls = 1 if self._is_single or self.is_harmony else use.max_calls
        if self.is_harmony:
            make: Callable[[], PartReader] = partial(
                HarmonyReader,
                has_tools=bool(use.tools),
                is_continued=begun is not None,
                max_calls=max_calls,
            )
            return make, self._harmony_ids
        syntax = self._with_tools if use.tools else self._without_tools
        if syntax.think is None and syntax.family is None and not syntax.edges:
            return None, frozenset()
        is_reasoning = syntax.think is not None and has_begun(
            syntax.think, self.prompt_end(prompt, begun), is_continued=begun is not None
        )
        make = partial(
            MessageReader,
            syntax,
            tools=use.tools,
            is_reasoning=is_reasoning,
            max_calls=max_calls,
        )
        return make, self._shown[syntax]


def _edges(tokenizer: Tokenizer, family: ToolFamily | None) -> tuple[Edges, State]:
    if tokenizer.response_format == "muse_spark":
        return _MUSE_EDGES, State.HEADER
    return (_KIMI_K3_EDGES if family is not None and family.name == "kimi_k3" else ()), State.CONTENT


def _within(markers: Iterable[str], special: Mapping[str, int]) -> frozenset[int]:
    """The special tokens that are part of a marker."""
    found = list(markers)
    return frozenset(token for name, token in special.items() if any(name in marker for marker in found))

"""From a request's body to its Answer. Event loop only; long texts are tokenized in a thread."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cluster.api.answer import KEEP_ALIVE_S, Answer, Job
from cluster.api.chat import ChatShape
from cluster.api.chat_prompt import read_chat
from cluster.api.choice import TextOptions
from cluster.api.completions import CompletionShape
from cluster.api.errors import ApiError, bad_request, unavailable
from cluster.api.grammar_checker import GrammarChecker
from cluster.api.head_client import HeadClient
from cluster.api.metrics import Metrics
from cluster.api.prompt import Limits, Prompt, answer_tokens, check_answers, read_prompts
from cluster.api.sampling import SamplingDefaults, check_sampling, read_sampling, with_seed
from cluster.api.schema import ChatBody, CompletionBody, GenerateBody, parse_body
from cluster.api.shape import AnswerOptions, Shape
from cluster.api.structure import read_structure, refused
from cluster.api.syntax import ModelSyntax
from cluster.api.tracing import Tracer
from cluster.grammar import GrammarError
from cluster.logs import current_request
from cluster.tokenizer import Tokenizer
from planner.embedding_files import EmbeddingModel
from proto import head_pb2

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's and vLLM's, for /v1/completions
INLINE_BYTES = 8192  # a longer body is tokenized in a thread, beside the streams

T = TypeVar("T")


class Service:
    """What all requests share. The tokenizer comes later than the first request may."""

    def __init__(
        self,
        model: str,
        base: Path,
        head: HeadClient,
        max_queued: int,
        adapters: Sequence[str] = (),
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self.adapters = tuple(adapters)
        self.head = head
        self.tracer: Tracer | None = None  # None: this process does not know the nodes
        self.metrics = Metrics()
        self.started_at_s = int(time.time())
        self.model_names = served_names(model, base)
        self._max_queued = max_queued
        self._keep_alive_s = keep_alive_s
        self._tokenizer: Tokenizer | None = None
        self._syntax: ModelSyntax | None = None
        self._defaults = SamplingDefaults()
        self.embedding: EmbeddingModel | str = "it is being loaded"
        self._grammars = GrammarChecker()

    @property
    def model(self) -> str:
        """The id that clients see."""
        return self.model_names[0]

    @property
    def is_tokenizer_loaded(self) -> bool:
        return self._tokenizer is not None

    def use(self, tokenizer: Tokenizer, defaults: SamplingDefaults, embedding: EmbeddingModel | str) -> None:
        """The tokenizer is there: requests may come. embedding: or why the model gives no embeddings."""
        self.embedding = embedding
        self._syntax = ModelSyntax(tokenizer)
        self._tokenizer, self._defaults = tokenizer, defaults

    async def complete(self, raw: bytes) -> Answer:
        """POST /v1/completions; raises ApiError."""
        body = parse_body(raw, CompletionBody)
        tokenizer = self._ready(body)
        limits = self.limits()
        grammar, field = read_structure(body)
        await self._check(grammar, field)
        prompts = await tokenized(len(raw), lambda: read_prompts(body, tokenizer, limits))
        options = self._options(body, body.logprobs is not None, body.logprobs or 0)
        job = self._job(
            "cmpl-",
            body,
            prompts,
            options,
            default_tokens=DEFAULT_COMPLETION_TOKENS,
            eos_ids=tokenizer.eos_ids,
            grammar=grammar,
        )
        shape = CompletionShape(
            job.requests[0].request_id, int(time.time()), self.served_id(body.model), options, tokenizer
        )
        return Answer(job, shape, tokenizer, self.head, self.metrics, keep_alive_s=self._keep_alive_s)

    async def chat(self, raw: bytes) -> Answer:
        """POST /v1/chat/completions; raises ApiError."""
        body = parse_body(raw, ChatBody)

        def shape(job: Job, tokenizer: Tokenizer) -> ChatShape:
            answer_id, model = job.requests[0].request_id, self.served_id(body.model)
            return ChatShape(answer_id, int(time.time()), model, job.options, tokenizer)

        return await self.answer_chat(body, len(raw), "chatcmpl-", shape)

    async def answer_chat(
        self,
        body: ChatBody,
        num_bytes: int,
        prefix: str,
        make_shape: Callable[[Job, Tokenizer], Shape],
        *,
        is_clamped: bool = False,
    ) -> Answer:
        """The answer to a chat in any dialect; raises ApiError. `prefix` is that of its id.

        `is_clamped`: one that asks for more tokens than the context has left gets these.
        """
        tokenizer = self._ready(body)
        prompt = await self.chat_prompt(body, num_bytes)
        await self._check(prompt.grammar, prompt.grammar_field)
        options = self._options(body, bool(body.logprobs), body.top_logprobs or 0)
        job = self._job(
            prefix,
            body,
            [prompt],
            options,
            default_tokens=None,
            eos_ids=tokenizer.eos_ids,
            grammar=prompt.grammar,
            is_clamped=is_clamped,
        )
        shape = make_shape(job, tokenizer)
        return Answer(job, shape, tokenizer, self.head, self.metrics, keep_alive_s=self._keep_alive_s)

    async def chat_prompt(self, body: ChatBody, num_bytes: int) -> Prompt:
        """The tokens of a chat; raises ApiError."""
        tokenizer, syntax, limits = self._ready(body), self._syntax, self.limits()
        assert syntax is not None
        return await tokenized(num_bytes, lambda: read_chat(body, tokenizer, syntax, limits))

    def served_id(self, asked: str | None) -> str:
        """The id of the model or adapter that `asked` names."""
        return asked if asked is not None and asked in self.adapters else self.model

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for a model that is not served."""
        if name not in (*self.model_names, *self.adapters):
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist here; {self._served_words}.",
                param="model",
                code="model_not_found",
            )

    @property
    def _served_words(self) -> str:
        if not self.adapters:
            return f"the served model is {self.model!r}"
        return f"the served models are {', '.join(map(repr, (self.model, *self.adapters)))}"

    def _ready(self, body: GenerateBody) -> Tokenizer:
        body.stops  # noqa: B018  # a wrong one is refused before any work
        return self.tokenizer(body.model)

    def tokenizer(self, model: str | None) -> Tokenizer:
        """For requests to `model`; raises ApiError where that is another one, or nothing is loaded."""
        if model is not None:
            self.check_model(model)
        if self._tokenizer is None:
            raise unavailable("The tokenizer is being loaded.", "loading")
        return self._tokenizer

    async def _check(self, grammar: str, field: str) -> None:
        """Raises ApiError for a grammar that cannot be followed; `field` asked for it."""
        try:
            await self._grammars.check(grammar)
        except GrammarError as error:
            raise refused(field, error) from None

    def limits(self) -> Limits:
        """What the ring serves, as far as it is known."""
        status = self.head.status
        size = 0 if self._tokenizer is None else self._tokenizer.size
        if status is None:
            return Limits(0, size)
        return Limits(status.context, status.vocab_size or size, status.max_active, self._max_queued)

    def check_ring(self, limits: Limits) -> None:
        """Raises ApiError 503 while the ring has no plan."""
        if not limits.context:
            status = self.head.status
            raise unavailable(
                self.head.trouble or (status.reason if status else "") or "The ring is starting."
            )

    def _options(self, body: GenerateBody, has_logprobs: bool, num_top: int) -> AnswerOptions:
        return AnswerOptions(
            is_streamed=bool(body.stream),
            has_usage=bool(body.stream_options and body.stream_options.include_usage),
            has_token_ids=bool(body.return_token_ids),
            has_logprobs=has_logprobs,
            num_top=num_top,
        )

    def _job(
        self,
        prefix: str,
        body: GenerateBody,
        prompts: Sequence[Prompt],
        options: AnswerOptions,
        *,
        default_tokens: int | None,
        eos_ids: frozenset[int],
        grammar: str = "",
        is_clamped: bool = False,
    ) -> Job:
        limits, place = self.limits(), "prompt" if isinstance(body, CompletionBody) else "messages"
        self.check_ring(limits)
        check_answers(len(prompts), body.n or 1, limits)
        sampling = read_sampling(body, self._defaults, eos_ids, limits.vocab_size)
        sampling.grammar = grammar
        check_sampling(sampling, limits.vocab_size)
        answer_id = prefix + uuid.uuid4().hex
        requests: list[head_pb2.GenerateRequest] = []
        repeated: list[Prompt] = []
        asked = body.max_completion_tokens or body.max_tokens
        is_written = asked != 0
        if not is_written:
            asked = 1  # what is drawn behind the prompt goes nowhere
        if is_clamped:
            asked, default_tokens = None, asked
        for prompt in prompts:
            max_tokens = answer_tokens(asked, default_tokens, prompt.tokens, limits, place)
            if sampling.min_tokens > max_tokens:
                raise bad_request(
                    f"min_tokens is {sampling.min_tokens}, but the answer has at most {max_tokens} tokens.",
                    "min_tokens",
                )
            for choice in range(body.n or 1):
                index = len(requests)
                requests.append(
                    head_pb2.GenerateRequest(
                        request_id=f"{answer_id}-{index}" if index else answer_id,
                        prompt=prompt.tokens,
                        max_tokens=max_tokens,
                        priority=body.priority or 0,
                        sampling=with_seed(sampling, choice),
                        adapter=body.model if body.model in self.adapters else "",
                        trace_id=current_request.get(),
                    )
                )
                repeated.append(prompt)
        text = TextOptions(
            stops=body.stops,
            stop_ids=frozenset(sampling.stop_ids),
            is_stop_included=bool(body.include_stop_str_in_output),
            min_tokens=body.min_tokens or 0,
            skip_special=body.skip_special_tokens is not False,
            keeps_tokens=options.has_token_ids or options.has_logprobs,
            shows_reasoning=not isinstance(body, ChatBody) or body.include_reasoning is not False,
            make_reader=prompts[0].make_reader,
            shown_ids=prompts[0].shown_ids,
            is_scored=sampling.prompt_logprobs,
            is_written=is_written,
        )
        return Job(repeated, requests, sum(len(prompt.tokens) for prompt in prompts), text, options)


def served_names(model: str, base: Path) -> tuple[str, ...]:
    """The served id (a folder's last component, or the hub id), then what else clients may say."""
    path = Path(model).expanduser()
    places = [path] if path.is_absolute() else [base / path, Path.cwd() / path]
    folder = next((place for place in places if place.is_dir()), None)
    names = [model] if folder is None else [folder.resolve().name, model]
    return tuple(dict.fromkeys(names))


async def tokenized(num_bytes: int, read: Callable[[], T]) -> T:
    """What `read` comes to, of a body of so many bytes; a long one is read in a thread."""
    return read() if num_bytes <= INLINE_BYTES else await asyncio.to_thread(read)

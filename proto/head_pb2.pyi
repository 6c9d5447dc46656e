from proto import control_pb2 as _control_pb2
from proto import ring_pb2 as _ring_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "prompt", "max_tokens", "sampling", "adapter", "priority", "trace_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    sampling: _ring_pb2.Sampling
    adapter: str
    priority: int
    trace_id: str
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_ring_pb2.Sampling, _Mapping]] = ..., adapter: _Optional[str] = ..., priority: _Optional[int] = ..., trace_id: _Optional[str] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("tokens", "finish_reason", "prompt_tokens", "completion_tokens", "queue_ms", "prefill_ms", "cached_tokens", "prompt", "vector")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[_ring_pb2.SampledToken]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    queue_ms: float
    prefill_ms: float
    cached_tokens: int
    prompt: _containers.RepeatedCompositeFieldContainer[_ring_pb2.SampledToken]
    vector: bytes
    def __init__(self, tokens: _Optional[_Iterable[_Union[_ring_pb2.SampledToken, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., queue_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., prompt: _Optional[_Iterable[_Union[_ring_pb2.SampledToken, _Mapping]]] = ..., vector: _Optional[bytes] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("generate", "leave")
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    generate: GenerateRequest
    leave: CancelRequest
    def __init__(self, generate: _Optional[_Union[GenerateRequest, _Mapping]] = ..., leave: _Optional[_Union[CancelRequest, _Mapping]] = ...) -> None: ...

class Answers(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    def __init__(self, answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("request_id", "reply", "code", "message")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reply: GenerateReply
    code: int
    message: str
    def __init__(self, request_id: _Optional[str] = ..., reply: _Optional[_Union[GenerateReply, _Mapping]] = ..., code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id", "is_finished")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    is_finished: bool
    def __init__(self, request_id: _Optional[str] = ..., is_finished: _Optional[bool] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...

class ClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PlanningRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PlanningReply(_message.Message):
    __slots__ = ("planning_json", "config_digest")
    PLANNING_JSON_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    planning_json: str
    config_digest: str
    def __init__(self, planning_json: _Optional[str] = ..., config_digest: _Optional[str] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("status", "epoch", "plan_json", "ranks", "num_active", "num_queued", "max_active", "context", "incarnation", "num_requests", "num_prompt_tokens", "num_completion_tokens", "num_failed", "reason", "vocab_size", "errors", "num_kept", "num_cached_tokens", "num_guessed", "num_guessed_right", "num_drafted", "num_draft_pauses", "num_prompts", "num_cached_prompts", "requests")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLAN_JSON_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    MAX_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GUESSED_FIELD_NUMBER: _ClassVar[int]
    NUM_GUESSED_RIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_PAUSES_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    status: str
    epoch: int
    plan_json: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    num_active: int
    num_queued: int
    max_active: int
    context: int
    incarnation: int
    num_requests: int
    num_prompt_tokens: int
    num_completion_tokens: int
    num_failed: int
    reason: str
    vocab_size: int
    errors: _containers.RepeatedCompositeFieldContainer[ErrorCount]
    num_kept: int
    num_cached_tokens: int
    num_guessed: int
    num_guessed_right: int
    num_drafted: int
    num_draft_pauses: int
    num_prompts: int
    num_cached_prompts: int
    requests: _containers.RepeatedCompositeFieldContainer[RequestStatus]
    def __init__(self, status: _Optional[str] = ..., epoch: _Optional[int] = ..., plan_json: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., num_active: _Optional[int] = ..., num_queued: _Optional[int] = ..., max_active: _Optional[int] = ..., context: _Optional[int] = ..., incarnation: _Optional[int] = ..., num_requests: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_completion_tokens: _Optional[int] = ..., num_failed: _Optional[int] = ..., reason: _Optional[str] = ..., vocab_size: _Optional[int] = ..., errors: _Optional[_Iterable[_Union[ErrorCount, _Mapping]]] = ..., num_kept: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_guessed: _Optional[int] = ..., num_guessed_right: _Optional[int] = ..., num_drafted: _Optional[int] = ..., num_draft_pauses: _Optional[int] = ..., num_prompts: _Optional[int] = ..., num_cached_prompts: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[RequestStatus, _Mapping]]] = ...) -> None: ...

class ErrorCount(_message.Message):
    __slots__ = ("kind", "count")
    KIND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    count: int
    def __init__(self, kind: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class RequestStatus(_message.Message):
    __slots__ = ("id", "state", "prompt_tokens", "prefilled_tokens", "completion_tokens", "max_tokens", "age_s", "adapter", "priority")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: str
    prompt_tokens: int
    prefilled_tokens: int
    completion_tokens: int
    max_tokens: int
    age_s: float
    adapter: str
    priority: int
    def __init__(self, id: _Optional[str] = ..., state: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., prefilled_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., age_s: _Optional[float] = ..., adapter: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class LogsRequest(_message.Message):
    __slots__ = ("rank", "lines")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    lines: int
    def __init__(self, rank: _Optional[int] = ..., lines: _Optional[int] = ...) -> None: ...

class RankLogs(_message.Message):
    __slots__ = ("rank", "name", "lines")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    name: str
    lines: _containers.RepeatedCompositeFieldContainer[_control_pb2.LogLine]
    def __init__(self, rank: _Optional[int] = ..., name: _Optional[str] = ..., lines: _Optional[_Iterable[_Union[_control_pb2.LogLine, _Mapping]]] = ...) -> None: ...

class PredictedMemory(_message.Message):
    __slots__ = ("weights", "kv_bytes", "activation_bytes", "budget_bytes", "reserve_bytes")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    weights: _control_pb2.Footprint
    kv_bytes: int
    activation_bytes: int
    budget_bytes: int
    reserve_bytes: int
    def __init__(self, weights: _Optional[_Union[_control_pb2.Footprint, _Mapping]] = ..., kv_bytes: _Optional[int] = ..., activation_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., reserve_bytes: _Optional[int] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "name", "state", "reason", "node", "age_s", "predicted")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    rank: int
    name: str
    state: str
    reason: str
    node: _control_pb2.NodeStatus
    age_s: float
    predicted: PredictedMemory
    def __init__(self, rank: _Optional[int] = ..., name: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., node: _Optional[_Union[_control_pb2.NodeStatus, _Mapping]] = ..., age_s: _Optional[float] = ..., predicted: _Optional[_Union[PredictedMemory, _Mapping]] = ...) -> None: ...

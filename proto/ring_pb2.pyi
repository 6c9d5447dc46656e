from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    HELLO: _ClassVar[Kind]
    BEAT: _ClassVar[Kind]
    STEP: _ClassVar[Kind]
    RESULT: _ClassVar[Kind]
    PART: _ClassVar[Kind]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    BOOL: _ClassVar[DType]
    UINT8: _ClassVar[DType]
    UINT16: _ClassVar[DType]
    UINT32: _ClassVar[DType]
    UINT64: _ClassVar[DType]
    INT8: _ClassVar[DType]
    INT16: _ClassVar[DType]
    INT32: _ClassVar[DType]
    INT64: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    FLOAT64: _ClassVar[DType]
    COMPLEX64: _ClassVar[DType]
KIND_UNSPECIFIED: Kind
HELLO: Kind
BEAT: Kind
STEP: Kind
RESULT: Kind
PART: Kind
DTYPE_UNSPECIFIED: DType
BOOL: DType
UINT8: DType
UINT16: DType
UINT32: DType
UINT64: DType
INT8: DType
INT16: DType
INT32: DType
INT64: DType
FLOAT16: DType
BFLOAT16: DType
FLOAT32: DType
FLOAT64: DType
COMPLEX64: DType

class Frame(_message.Message):
    __slots__ = ("header_bytes", "kind", "epoch", "seq", "opens", "closes", "slots", "tensors", "payload_total_bytes", "payload_offset_bytes", "hello", "beat", "is_batched", "keeps", "keep_tokens", "forks", "payload")
    HEADER_BYTES_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    OPENS_FIELD_NUMBER: _ClassVar[int]
    CLOSES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    IS_BATCHED_FIELD_NUMBER: _ClassVar[int]
    KEEPS_FIELD_NUMBER: _ClassVar[int]
    KEEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FORKS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header_bytes: int
    kind: Kind
    epoch: int
    seq: int
    opens: _containers.RepeatedCompositeFieldContainer[SessionSpec]
    closes: _containers.RepeatedScalarFieldContainer[int]
    slots: _containers.RepeatedCompositeFieldContainer[Slot]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorMeta]
    payload_total_bytes: int
    payload_offset_bytes: int
    hello: Hello
    beat: Beat
    is_batched: bool
    keeps: _containers.RepeatedScalarFieldContainer[int]
    keep_tokens: _containers.RepeatedScalarFieldContainer[int]
    forks: _containers.RepeatedCompositeFieldContainer[Fork]
    payload: bytes
    def __init__(self, header_bytes: _Optional[int] = ..., kind: _Optional[_Union[Kind, str]] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., opens: _Optional[_Iterable[_Union[SessionSpec, _Mapping]]] = ..., closes: _Optional[_Iterable[int]] = ..., slots: _Optional[_Iterable[_Union[Slot, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[TensorMeta, _Mapping]]] = ..., payload_total_bytes: _Optional[int] = ..., payload_offset_bytes: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., is_batched: _Optional[bool] = ..., keeps: _Optional[_Iterable[int]] = ..., keep_tokens: _Optional[_Iterable[int]] = ..., forks: _Optional[_Iterable[_Union[Fork, _Mapping]]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Fork(_message.Message):
    __slots__ = ("session", "from_session")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    FROM_SESSION_FIELD_NUMBER: _ClassVar[int]
    session: int
    from_session: int
    def __init__(self, session: _Optional[int] = ..., from_session: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "config_digest", "plan_digest", "epoch", "from_rank", "to_rank", "start", "stop", "dtype", "incarnation", "is_forced")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FROM_RANK_FIELD_NUMBER: _ClassVar[int]
    TO_RANK_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    IS_FORCED_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    config_digest: str
    plan_digest: str
    epoch: int
    from_rank: int
    to_rank: int
    start: int
    stop: int
    dtype: str
    incarnation: int
    is_forced: bool
    def __init__(self, protocol: _Optional[int] = ..., config_digest: _Optional[str] = ..., plan_digest: _Optional[str] = ..., epoch: _Optional[int] = ..., from_rank: _Optional[int] = ..., to_rank: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., dtype: _Optional[str] = ..., incarnation: _Optional[int] = ..., is_forced: _Optional[bool] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("progress", "busy_s", "activity")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    progress: int
    busy_s: float
    activity: str
    def __init__(self, progress: _Optional[int] = ..., busy_s: _Optional[float] = ..., activity: _Optional[str] = ...) -> None: ...

class TensorMeta(_message.Message):
    __slots__ = ("dtype", "shape")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Slot(_message.Message):
    __slots__ = ("session", "position", "tokens", "is_sampled", "num_draws", "structure", "num_tensors", "error", "result", "more", "prompt", "vector")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAWS_FIELD_NUMBER: _ClassVar[int]
    STRUCTURE_FIELD_NUMBER: _ClassVar[int]
    NUM_TENSORS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    session: int
    position: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    is_sampled: bool
    num_draws: int
    structure: str
    num_tensors: int
    error: str
    result: SampledToken
    more: _containers.RepeatedCompositeFieldContainer[SampledToken]
    prompt: _containers.RepeatedCompositeFieldContainer[SampledToken]
    vector: bytes
    def __init__(self, session: _Optional[int] = ..., position: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., is_sampled: _Optional[bool] = ..., num_draws: _Optional[int] = ..., structure: _Optional[str] = ..., num_tensors: _Optional[int] = ..., error: _Optional[str] = ..., result: _Optional[_Union[SampledToken, _Mapping]] = ..., more: _Optional[_Iterable[_Union[SampledToken, _Mapping]]] = ..., prompt: _Optional[_Iterable[_Union[SampledToken, _Mapping]]] = ..., vector: _Optional[bytes] = ...) -> None: ...

class SampledToken(_message.Message):
    __slots__ = ("id", "logprob", "top")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("id", "logprob")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class SessionSpec(_message.Message):
    __slots__ = ("session", "prompt_tokens", "max_tokens", "sampling", "adapter", "request_id", "from_session", "from_tokens")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_SESSION_FIELD_NUMBER: _ClassVar[int]
    FROM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    session: int
    prompt_tokens: int
    max_tokens: int
    sampling: Sampling
    adapter: str
    request_id: str
    from_session: int
    from_tokens: int
    def __init__(self, session: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., adapter: _Optional[str] = ..., request_id: _Optional[str] = ..., from_session: _Optional[int] = ..., from_tokens: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "repetition_context", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "logprobs", "top_logprobs", "min_tokens", "stop_ids", "prompt_logprobs", "grammar", "pooling")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    repetition_context: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    logprobs: bool
    top_logprobs: int
    min_tokens: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_logprobs: bool
    grammar: str
    pooling: Pooling
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., repetition_context: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., logprobs: _Optional[bool] = ..., top_logprobs: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ..., prompt_logprobs: _Optional[bool] = ..., grammar: _Optional[str] = ..., pooling: _Optional[_Union[Pooling, _Mapping]] = ...) -> None: ...

class Pooling(_message.Message):
    __slots__ = ("kind", "dimensions", "is_normalised")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NONE: _ClassVar[Pooling.Kind]
        LAST: _ClassVar[Pooling.Kind]
        MEAN: _ClassVar[Pooling.Kind]
        FIRST: _ClassVar[Pooling.Kind]
    NONE: Pooling.Kind
    LAST: Pooling.Kind
    MEAN: Pooling.Kind
    FIRST: Pooling.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    IS_NORMALISED_FIELD_NUMBER: _ClassVar[int]
    kind: Pooling.Kind
    dimensions: int
    is_normalised: bool
    def __init__(self, kind: _Optional[_Union[Pooling.Kind, str]] = ..., dimensions: _Optional[int] = ..., is_normalised: _Optional[bool] = ...) -> None: ...

class EdgeReply(_message.Message):
    __slots__ = ("welcome", "credit", "beat", "abort")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    credit: Credit
    beat: Beat
    abort: Abort
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("incarnation", "window_bytes")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    window_bytes: int
    def __init__(self, incarnation: _Optional[int] = ..., window_bytes: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("epoch", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    reason: str
    def __init__(self, epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

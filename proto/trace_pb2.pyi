from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TraceRequest(_message.Message):
    __slots__ = ("id", "lease_s", "layers_per_span", "has_memory")
    ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    LAYERS_PER_SPAN_FIELD_NUMBER: _ClassVar[int]
    HAS_MEMORY_FIELD_NUMBER: _ClassVar[int]
    id: str
    lease_s: float
    layers_per_span: int
    has_memory: bool
    def __init__(self, id: _Optional[str] = ..., lease_s: _Optional[float] = ..., layers_per_span: _Optional[int] = ..., has_memory: _Optional[bool] = ...) -> None: ...

class TraceReply(_message.Message):
    __slots__ = ("reason", "received_ns", "sent_ns", "rank", "name", "incarnation")
    REASON_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_NS_FIELD_NUMBER: _ClassVar[int]
    SENT_NS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    reason: str
    received_ns: int
    sent_ns: int
    rank: int
    name: str
    incarnation: int
    def __init__(self, reason: _Optional[str] = ..., received_ns: _Optional[int] = ..., sent_ns: _Optional[int] = ..., rank: _Optional[int] = ..., name: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class PullTraceRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class TraceChunk(_message.Message):
    __slots__ = ("records", "num_dropped")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPPED_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[TraceRecord]
    num_dropped: int
    def __init__(self, records: _Optional[_Iterable[_Union[TraceRecord, _Mapping]]] = ..., num_dropped: _Optional[int] = ...) -> None: ...

class TraceRecord(_message.Message):
    __slots__ = ("kind", "seq", "began_ns", "ended_ns", "peer", "numbers", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    BEGAN_NS_FIELD_NUMBER: _ClassVar[int]
    ENDED_NS_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: int
    seq: int
    began_ns: int
    ended_ns: int
    peer: int
    numbers: _containers.RepeatedScalarFieldContainer[int]
    text: str
    def __init__(self, kind: _Optional[int] = ..., seq: _Optional[int] = ..., began_ns: _Optional[int] = ..., ended_ns: _Optional[int] = ..., peer: _Optional[int] = ..., numbers: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ...) -> None: ...

from proto import trace_pb2 as _trace_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_STATE_UNSPECIFIED: _ClassVar[NodeState]
    IDLE: _ClassVar[NodeState]
    LOADING: _ClassVar[NodeState]
    CONNECTING: _ClassVar[NodeState]
    READY: _ClassVar[NodeState]
    FAILED: _ClassVar[NodeState]
    DRAINING: _ClassVar[NodeState]
NODE_STATE_UNSPECIFIED: NodeState
IDLE: NodeState
LOADING: NodeState
CONNECTING: NodeState
READY: NodeState
FAILED: NodeState
DRAINING: NodeState

class ProfileRequest(_message.Message):
    __slots__ = ("config_digest",)
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    config_digest: str
    def __init__(self, config_digest: _Optional[str] = ...) -> None: ...

class NodeProfile(_message.Message):
    __slots__ = ("name", "chip", "gpu_cores", "memory_bytes", "ceiling_bytes", "available_bytes", "device", "mlx_version", "mlx_lm_version", "macrame_version", "config_digest", "platform", "speeds", "forms", "addresses")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHIP_FIELD_NUMBER: _ClassVar[int]
    GPU_CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CEILING_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MLX_VERSION_FIELD_NUMBER: _ClassVar[int]
    MLX_LM_VERSION_FIELD_NUMBER: _ClassVar[int]
    MACRAME_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    SPEEDS_FIELD_NUMBER: _ClassVar[int]
    FORMS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    name: str
    chip: str
    gpu_cores: int
    memory_bytes: int
    ceiling_bytes: int
    available_bytes: int
    device: str
    mlx_version: str
    mlx_lm_version: str
    macrame_version: str
    config_digest: str
    platform: str
    speeds: Speeds
    forms: _containers.RepeatedCompositeFieldContainer[FormTimes]
    addresses: _containers.RepeatedCompositeFieldContainer[NodeAddress]
    def __init__(self, name: _Optional[str] = ..., chip: _Optional[str] = ..., gpu_cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., ceiling_bytes: _Optional[int] = ..., available_bytes: _Optional[int] = ..., device: _Optional[str] = ..., mlx_version: _Optional[str] = ..., mlx_lm_version: _Optional[str] = ..., macrame_version: _Optional[str] = ..., config_digest: _Optional[str] = ..., platform: _Optional[str] = ..., speeds: _Optional[_Union[Speeds, _Mapping]] = ..., forms: _Optional[_Iterable[_Union[FormTimes, _Mapping]]] = ..., addresses: _Optional[_Iterable[_Union[NodeAddress, _Mapping]]] = ...) -> None: ...

class Speeds(_message.Message):
    __slots__ = ("read_bytes_ms", "flops_ms", "layer_ms", "stage_ms", "formats", "measured_on")
    READ_BYTES_MS_FIELD_NUMBER: _ClassVar[int]
    FLOPS_MS_FIELD_NUMBER: _ClassVar[int]
    LAYER_MS_FIELD_NUMBER: _ClassVar[int]
    STAGE_MS_FIELD_NUMBER: _ClassVar[int]
    FORMATS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_ON_FIELD_NUMBER: _ClassVar[int]
    read_bytes_ms: float
    flops_ms: float
    layer_ms: float
    stage_ms: float
    formats: _containers.RepeatedCompositeFieldContainer[FormatRate]
    measured_on: str
    def __init__(self, read_bytes_ms: _Optional[float] = ..., flops_ms: _Optional[float] = ..., layer_ms: _Optional[float] = ..., stage_ms: _Optional[float] = ..., formats: _Optional[_Iterable[_Union[FormatRate, _Mapping]]] = ..., measured_on: _Optional[str] = ...) -> None: ...

class FormatRate(_message.Message):
    __slots__ = ("format", "weights_ms", "flops_ms", "decoded_ms")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_MS_FIELD_NUMBER: _ClassVar[int]
    FLOPS_MS_FIELD_NUMBER: _ClassVar[int]
    DECODED_MS_FIELD_NUMBER: _ClassVar[int]
    format: str
    weights_ms: float
    flops_ms: float
    decoded_ms: float
    def __init__(self, format: _Optional[str] = ..., weights_ms: _Optional[float] = ..., flops_ms: _Optional[float] = ..., decoded_ms: _Optional[float] = ...) -> None: ...

class FormTimes(_message.Message):
    __slots__ = ("num_experts", "top_k", "inputs", "outputs", "formats", "spans")
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    FORMATS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    num_experts: int
    top_k: int
    inputs: int
    outputs: int
    formats: _containers.RepeatedScalarFieldContainer[str]
    spans: _containers.RepeatedCompositeFieldContainer[FormSpan]
    def __init__(self, num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., inputs: _Optional[int] = ..., outputs: _Optional[int] = ..., formats: _Optional[_Iterable[str]] = ..., spans: _Optional[_Iterable[_Union[FormSpan, _Mapping]]] = ...) -> None: ...

class FormSpan(_message.Message):
    __slots__ = ("first_rows", "last_rows", "first_ms", "last_ms")
    FIRST_ROWS_FIELD_NUMBER: _ClassVar[int]
    LAST_ROWS_FIELD_NUMBER: _ClassVar[int]
    FIRST_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_MS_FIELD_NUMBER: _ClassVar[int]
    first_rows: int
    last_rows: int
    first_ms: float
    last_ms: float
    def __init__(self, first_rows: _Optional[int] = ..., last_rows: _Optional[int] = ..., first_ms: _Optional[float] = ..., last_ms: _Optional[float] = ...) -> None: ...

class NodeAddress(_message.Message):
    __slots__ = ("ip", "interface", "kind", "mtu", "speed_mbit_s", "is_bound")
    IP_FIELD_NUMBER: _ClassVar[int]
    INTERFACE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    SPEED_MBIT_S_FIELD_NUMBER: _ClassVar[int]
    IS_BOUND_FIELD_NUMBER: _ClassVar[int]
    ip: str
    interface: str
    kind: str
    mtu: int
    speed_mbit_s: int
    is_bound: bool
    def __init__(self, ip: _Optional[str] = ..., interface: _Optional[str] = ..., kind: _Optional[str] = ..., mtu: _Optional[int] = ..., speed_mbit_s: _Optional[int] = ..., is_bound: _Optional[bool] = ...) -> None: ...

class AssignRequest(_message.Message):
    __slots__ = ("epoch", "config_digest", "plan_json", "plan_digest", "model_digest", "head_incarnation", "revision", "file_samples", "addresses")
    class FileSamplesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PLAN_JSON_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEAD_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FILE_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    config_digest: str
    plan_json: str
    plan_digest: str
    model_digest: str
    head_incarnation: int
    revision: str
    file_samples: _containers.ScalarMap[str, str]
    addresses: _containers.RepeatedCompositeFieldContainer[RankAddresses]
    def __init__(self, epoch: _Optional[int] = ..., config_digest: _Optional[str] = ..., plan_json: _Optional[str] = ..., plan_digest: _Optional[str] = ..., model_digest: _Optional[str] = ..., head_incarnation: _Optional[int] = ..., revision: _Optional[str] = ..., file_samples: _Optional[_Mapping[str, str]] = ..., addresses: _Optional[_Iterable[_Union[RankAddresses, _Mapping]]] = ...) -> None: ...

class RankAddresses(_message.Message):
    __slots__ = ("rank", "addresses")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    addresses: _containers.RepeatedCompositeFieldContainer[NodeAddress]
    def __init__(self, rank: _Optional[int] = ..., addresses: _Optional[_Iterable[_Union[NodeAddress, _Mapping]]] = ...) -> None: ...

class AssignReply(_message.Message):
    __slots__ = ("accepted", "reason", "is_overtaken")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    IS_OVERTAKEN_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    is_overtaken: bool
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ..., is_overtaken: _Optional[bool] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("beat_interval_ms", "head_incarnation")
    BEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    HEAD_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    beat_interval_ms: int
    head_incarnation: int
    def __init__(self, beat_interval_ms: _Optional[int] = ..., head_incarnation: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("sessions_left",)
    SESSIONS_LEFT_FIELD_NUMBER: _ClassVar[int]
    sessions_left: int
    def __init__(self, sessions_left: _Optional[int] = ...) -> None: ...

class Footprint(_message.Message):
    __slots__ = ("layers_bytes", "embed_bytes", "norm_bytes", "head_bytes", "other_bytes", "full_model_bytes")
    LAYERS_BYTES_FIELD_NUMBER: _ClassVar[int]
    EMBED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NORM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    OTHER_BYTES_FIELD_NUMBER: _ClassVar[int]
    FULL_MODEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    layers_bytes: int
    embed_bytes: int
    norm_bytes: int
    head_bytes: int
    other_bytes: int
    full_model_bytes: int
    def __init__(self, layers_bytes: _Optional[int] = ..., embed_bytes: _Optional[int] = ..., norm_bytes: _Optional[int] = ..., head_bytes: _Optional[int] = ..., other_bytes: _Optional[int] = ..., full_model_bytes: _Optional[int] = ...) -> None: ...

class StageStats(_message.Message):
    __slots__ = ("num_steps", "num_tokens", "busy_ms", "uptime_ms", "recent_step_ms", "recent_hop_ms", "decode_ms", "decode_position", "chunk_ms", "chunk_tokens", "chunk_position", "trim_window", "reach", "decode_rows", "recent_hop_rank", "num_overlapped", "num_built_ahead", "num_dropped_ahead", "num_handed_over", "num_late", "num_begun")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUSY_MS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    RECENT_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    RECENT_HOP_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_POSITION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_MS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_POSITION_FIELD_NUMBER: _ClassVar[int]
    TRIM_WINDOW_FIELD_NUMBER: _ClassVar[int]
    REACH_FIELD_NUMBER: _ClassVar[int]
    DECODE_ROWS_FIELD_NUMBER: _ClassVar[int]
    RECENT_HOP_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_OVERLAPPED_FIELD_NUMBER: _ClassVar[int]
    NUM_BUILT_AHEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPPED_AHEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    NUM_LATE_FIELD_NUMBER: _ClassVar[int]
    NUM_BEGUN_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_tokens: int
    busy_ms: float
    uptime_ms: float
    recent_step_ms: _containers.RepeatedScalarFieldContainer[float]
    recent_hop_ms: _containers.RepeatedScalarFieldContainer[float]
    decode_ms: _containers.RepeatedScalarFieldContainer[float]
    decode_position: _containers.RepeatedScalarFieldContainer[int]
    chunk_ms: _containers.RepeatedScalarFieldContainer[float]
    chunk_tokens: _containers.RepeatedScalarFieldContainer[int]
    chunk_position: _containers.RepeatedScalarFieldContainer[int]
    trim_window: int
    reach: int
    decode_rows: _containers.RepeatedScalarFieldContainer[int]
    recent_hop_rank: _containers.RepeatedScalarFieldContainer[int]
    num_overlapped: int
    num_built_ahead: int
    num_dropped_ahead: int
    num_handed_over: int
    num_late: int
    num_begun: int
    def __init__(self, num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., busy_ms: _Optional[float] = ..., uptime_ms: _Optional[float] = ..., recent_step_ms: _Optional[_Iterable[float]] = ..., recent_hop_ms: _Optional[_Iterable[float]] = ..., decode_ms: _Optional[_Iterable[float]] = ..., decode_position: _Optional[_Iterable[int]] = ..., chunk_ms: _Optional[_Iterable[float]] = ..., chunk_tokens: _Optional[_Iterable[int]] = ..., chunk_position: _Optional[_Iterable[int]] = ..., trim_window: _Optional[int] = ..., reach: _Optional[int] = ..., decode_rows: _Optional[_Iterable[int]] = ..., recent_hop_rank: _Optional[_Iterable[int]] = ..., num_overlapped: _Optional[int] = ..., num_built_ahead: _Optional[int] = ..., num_dropped_ahead: _Optional[int] = ..., num_handed_over: _Optional[int] = ..., num_late: _Optional[int] = ..., num_begun: _Optional[int] = ...) -> None: ...

class MemoryStatus(_message.Message):
    __slots__ = ("rss_bytes", "cache_bytes", "activation_bytes", "peak_kv_bytes", "memory_limit_bytes", "cache_limit_bytes", "wired_limit_bytes", "total_bytes", "available_bytes", "swap_used_bytes", "is_admitting", "num_trims")
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHE_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WIRED_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SWAP_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IS_ADMITTING_FIELD_NUMBER: _ClassVar[int]
    NUM_TRIMS_FIELD_NUMBER: _ClassVar[int]
    rss_bytes: int
    cache_bytes: int
    activation_bytes: int
    peak_kv_bytes: int
    memory_limit_bytes: int
    cache_limit_bytes: int
    wired_limit_bytes: int
    total_bytes: int
    available_bytes: int
    swap_used_bytes: int
    is_admitting: bool
    num_trims: int
    def __init__(self, rss_bytes: _Optional[int] = ..., cache_bytes: _Optional[int] = ..., activation_bytes: _Optional[int] = ..., peak_kv_bytes: _Optional[int] = ..., memory_limit_bytes: _Optional[int] = ..., cache_limit_bytes: _Optional[int] = ..., wired_limit_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., available_bytes: _Optional[int] = ..., swap_used_bytes: _Optional[int] = ..., is_admitting: _Optional[bool] = ..., num_trims: _Optional[int] = ...) -> None: ...

class DraftStatus(_message.Message):
    __slots__ = ("model", "weight_bytes", "kv_bytes", "num_passes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_PASSES_FIELD_NUMBER: _ClassVar[int]
    model: str
    weight_bytes: int
    kv_bytes: int
    num_passes: int
    def __init__(self, model: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., num_passes: _Optional[int] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("rank", "name", "incarnation", "epoch", "state", "reason", "progress", "busy_s", "activity", "loaded_bytes", "load_total_bytes", "footprint", "num_sessions", "kv_bytes", "active_bytes", "peak_bytes", "peak_rss_bytes", "import_base_rss_bytes", "stats", "cpu_s", "pid", "lost_edge", "start", "stop", "num_threads", "memory", "memory_pressure", "fetched_bytes", "copied_bytes", "edges", "certificate_ends_s", "certificate_warning", "kernels", "drafter", "logs")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FOOTPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMPORT_BASE_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    CPU_S_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    LOST_EDGE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PRESSURE_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    COPIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_ENDS_S_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_WARNING_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    LOGS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    name: str
    incarnation: int
    epoch: int
    state: NodeState
    reason: str
    progress: int
    busy_s: float
    activity: str
    loaded_bytes: int
    load_total_bytes: int
    footprint: Footprint
    num_sessions: int
    kv_bytes: int
    active_bytes: int
    peak_bytes: int
    peak_rss_bytes: int
    import_base_rss_bytes: int
    stats: StageStats
    cpu_s: float
    pid: int
    lost_edge: str
    start: int
    stop: int
    num_threads: int
    memory: MemoryStatus
    memory_pressure: str
    fetched_bytes: int
    copied_bytes: int
    edges: _containers.RepeatedCompositeFieldContainer[EdgeStatus]
    certificate_ends_s: float
    certificate_warning: str
    kernels: KernelStatus
    drafter: DraftStatus
    logs: _containers.RepeatedCompositeFieldContainer[LogLine]
    def __init__(self, rank: _Optional[int] = ..., name: _Optional[str] = ..., incarnation: _Optional[int] = ..., epoch: _Optional[int] = ..., state: _Optional[_Union[NodeState, str]] = ..., reason: _Optional[str] = ..., progress: _Optional[int] = ..., busy_s: _Optional[float] = ..., activity: _Optional[str] = ..., loaded_bytes: _Optional[int] = ..., load_total_bytes: _Optional[int] = ..., footprint: _Optional[_Union[Footprint, _Mapping]] = ..., num_sessions: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., active_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., peak_rss_bytes: _Optional[int] = ..., import_base_rss_bytes: _Optional[int] = ..., stats: _Optional[_Union[StageStats, _Mapping]] = ..., cpu_s: _Optional[float] = ..., pid: _Optional[int] = ..., lost_edge: _Optional[str] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., num_threads: _Optional[int] = ..., memory: _Optional[_Union[MemoryStatus, _Mapping]] = ..., memory_pressure: _Optional[str] = ..., fetched_bytes: _Optional[int] = ..., copied_bytes: _Optional[int] = ..., edges: _Optional[_Iterable[_Union[EdgeStatus, _Mapping]]] = ..., certificate_ends_s: _Optional[float] = ..., certificate_warning: _Optional[str] = ..., kernels: _Optional[_Union[KernelStatus, _Mapping]] = ..., drafter: _Optional[_Union[DraftStatus, _Mapping]] = ..., logs: _Optional[_Iterable[_Union[LogLine, _Mapping]]] = ...) -> None: ...

class KernelStatus(_message.Message):
    __slots__ = ("backend", "num_layers", "reason", "num_tested", "took_s", "verdicts", "num_calls", "num_matrices")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_TESTED_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    NUM_CALLS_FIELD_NUMBER: _ClassVar[int]
    NUM_MATRICES_FIELD_NUMBER: _ClassVar[int]
    backend: str
    num_layers: int
    reason: str
    num_tested: int
    took_s: float
    verdicts: _containers.RepeatedCompositeFieldContainer[KernelVerdict]
    num_calls: int
    num_matrices: int
    def __init__(self, backend: _Optional[str] = ..., num_layers: _Optional[int] = ..., reason: _Optional[str] = ..., num_tested: _Optional[int] = ..., took_s: _Optional[float] = ..., verdicts: _Optional[_Iterable[_Union[KernelVerdict, _Mapping]]] = ..., num_calls: _Optional[int] = ..., num_matrices: _Optional[int] = ...) -> None: ...

class KernelVerdict(_message.Message):
    __slots__ = ("block", "first_tokens", "last_tokens", "is_taken", "reason", "error", "ours_us", "mlx_us", "gb_s", "num_launches", "is_untested")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_TAKEN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    OURS_US_FIELD_NUMBER: _ClassVar[int]
    MLX_US_FIELD_NUMBER: _ClassVar[int]
    GB_S_FIELD_NUMBER: _ClassVar[int]
    NUM_LAUNCHES_FIELD_NUMBER: _ClassVar[int]
    IS_UNTESTED_FIELD_NUMBER: _ClassVar[int]
    block: str
    first_tokens: int
    last_tokens: int
    is_taken: bool
    reason: str
    error: float
    ours_us: float
    mlx_us: float
    gb_s: float
    num_launches: int
    is_untested: bool
    def __init__(self, block: _Optional[str] = ..., first_tokens: _Optional[int] = ..., last_tokens: _Optional[int] = ..., is_taken: _Optional[bool] = ..., reason: _Optional[str] = ..., error: _Optional[float] = ..., ours_us: _Optional[float] = ..., mlx_us: _Optional[float] = ..., gb_s: _Optional[float] = ..., num_launches: _Optional[int] = ..., is_untested: _Optional[bool] = ...) -> None: ...

class LogLine(_message.Message):
    __slots__ = ("number", "time_s", "level", "source", "message", "request_id")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    number: int
    time_s: float
    level: str
    source: str
    message: str
    request_id: str
    def __init__(self, number: _Optional[int] = ..., time_s: _Optional[float] = ..., level: _Optional[str] = ..., source: _Optional[str] = ..., message: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class EdgeStatus(_message.Message):
    __slots__ = ("to_rank", "address", "interface", "kind", "is_up")
    TO_RANK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INTERFACE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    IS_UP_FIELD_NUMBER: _ClassVar[int]
    to_rank: int
    address: str
    interface: str
    kind: str
    is_up: bool
    def __init__(self, to_rank: _Optional[int] = ..., address: _Optional[str] = ..., interface: _Optional[str] = ..., kind: _Optional[str] = ..., is_up: _Optional[bool] = ...) -> None: ...

class HoldingsRequest(_message.Message):
    __slots__ = ("model", "revision")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class HeldSpan(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class HeldFile(_message.Message):
    __slots__ = ("name", "size", "etag", "spans")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    etag: str
    spans: _containers.RepeatedCompositeFieldContainer[HeldSpan]
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., etag: _Optional[str] = ..., spans: _Optional[_Iterable[_Union[HeldSpan, _Mapping]]] = ...) -> None: ...

class HoldingsReply(_message.Message):
    __slots__ = ("revision", "files")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    revision: str
    files: _containers.RepeatedCompositeFieldContainer[HeldFile]
    def __init__(self, revision: _Optional[str] = ..., files: _Optional[_Iterable[_Union[HeldFile, _Mapping]]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsReply(_message.Message):
    __slots__ = ("models", "free_bytes")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[KeptModel]
    free_bytes: int
    def __init__(self, models: _Optional[_Iterable[_Union[KeptModel, _Mapping]]] = ..., free_bytes: _Optional[int] = ...) -> None: ...

class KeptModel(_message.Message):
    __slots__ = ("model", "revision", "place", "here_bytes", "total_bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    HERE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    place: str
    here_bytes: int
    total_bytes: int
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., place: _Optional[str] = ..., here_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class CopyRequest(_message.Message):
    __slots__ = ("model", "revision", "file", "start", "stop")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    file: str
    start: int
    stop: int
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., file: _Optional[str] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class CopyChunk(_message.Message):
    __slots__ = ("start", "data", "sha256")
    START_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    start: int
    data: bytes
    sha256: bytes
    def __init__(self, start: _Optional[int] = ..., data: _Optional[bytes] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class MeasureLinkRequest(_message.Message):
    __slots__ = ("to_address", "to_rank", "told", "is_forced")
    TO_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TO_RANK_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    IS_FORCED_FIELD_NUMBER: _ClassVar[int]
    to_address: str
    to_rank: int
    told: _containers.RepeatedCompositeFieldContainer[NodeAddress]
    is_forced: bool
    def __init__(self, to_address: _Optional[str] = ..., to_rank: _Optional[int] = ..., told: _Optional[_Iterable[_Union[NodeAddress, _Mapping]]] = ..., is_forced: _Optional[bool] = ...) -> None: ...

class LinkReport(_message.Message):
    __slots__ = ("activity", "paths")
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    activity: str
    paths: _containers.RepeatedCompositeFieldContainer[LinkPath]
    def __init__(self, activity: _Optional[str] = ..., paths: _Optional[_Iterable[_Union[LinkPath, _Mapping]]] = ...) -> None: ...

class LinkPath(_message.Message):
    __slots__ = ("ip", "reason", "local_ip", "interface", "peer_interface", "kind", "mtu", "speed_mbit_s", "round_trip_p50_ms", "round_trip_p99_ms", "num_round_trips", "bandwidth_gbit_s", "num_bytes")
    IP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LOCAL_IP_FIELD_NUMBER: _ClassVar[int]
    INTERFACE_FIELD_NUMBER: _ClassVar[int]
    PEER_INTERFACE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    SPEED_MBIT_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_P50_MS_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_P99_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUND_TRIPS_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_GBIT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    ip: str
    reason: str
    local_ip: str
    interface: str
    peer_interface: str
    kind: str
    mtu: int
    speed_mbit_s: int
    round_trip_p50_ms: float
    round_trip_p99_ms: float
    num_round_trips: int
    bandwidth_gbit_s: float
    num_bytes: int
    def __init__(self, ip: _Optional[str] = ..., reason: _Optional[str] = ..., local_ip: _Optional[str] = ..., interface: _Optional[str] = ..., peer_interface: _Optional[str] = ..., kind: _Optional[str] = ..., mtu: _Optional[int] = ..., speed_mbit_s: _Optional[int] = ..., round_trip_p50_ms: _Optional[float] = ..., round_trip_p99_ms: _Optional[float] = ..., num_round_trips: _Optional[int] = ..., bandwidth_gbit_s: _Optional[float] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class DiagnoseRequest(_message.Message):
    __slots__ = ("is_clock_only",)
    IS_CLOCK_ONLY_FIELD_NUMBER: _ClassVar[int]
    is_clock_only: bool
    def __init__(self, is_clock_only: _Optional[bool] = ...) -> None: ...

class DiagnoseReply(_message.Message):
    __slots__ = ("clock_s", "name", "rank", "host_name", "platform", "python_version", "macrame_version", "mlx_version", "mlx_lm_version", "config_digest", "model_digest", "findings")
    CLOCK_S_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    HOST_NAME_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    PYTHON_VERSION_FIELD_NUMBER: _ClassVar[int]
    MACRAME_VERSION_FIELD_NUMBER: _ClassVar[int]
    MLX_VERSION_FIELD_NUMBER: _ClassVar[int]
    MLX_LM_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    clock_s: float
    name: str
    rank: int
    host_name: str
    platform: str
    python_version: str
    macrame_version: str
    mlx_version: str
    mlx_lm_version: str
    config_digest: str
    model_digest: str
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    def __init__(self, clock_s: _Optional[float] = ..., name: _Optional[str] = ..., rank: _Optional[int] = ..., host_name: _Optional[str] = ..., platform: _Optional[str] = ..., python_version: _Optional[str] = ..., macrame_version: _Optional[str] = ..., mlx_version: _Optional[str] = ..., mlx_lm_version: _Optional[str] = ..., config_digest: _Optional[str] = ..., model_digest: _Optional[str] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("check", "status", "what", "why", "mend")
    CHECK_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    MEND_FIELD_NUMBER: _ClassVar[int]
    check: str
    status: str
    what: str
    why: str
    mend: str
    def __init__(self, check: _Optional[str] = ..., status: _Optional[str] = ..., what: _Optional[str] = ..., why: _Optional[str] = ..., mend: _Optional[str] = ...) -> None: ...

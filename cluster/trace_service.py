"""What a node answers to who traces it: the switch with its lease, its clock, the records. RPC threads."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc

from cluster.node import Node
from cluster.trace_memory import MemorySampler
from cluster.trace_recorder import Recorder, recorder, to_message
from proto import trace_pb2

CHUNK_RECORDS = 2048
MAX_ID_CHARS = 128
MAX_LAYERS_PER_SPAN = 1024


class TraceService:
    """Of one node's recorder."""

    def __init__(self, node: Node, records: Recorder = recorder) -> None:
        self._node, self._records = node, records
        self._sampler = MemorySampler(node, records)

    def switch(self, request: trace_pb2.TraceRequest) -> trace_pb2.TraceReply:
        """On, renewed or off; with this clock, before and after."""
        received = time.perf_counter_ns()
        if not 0 < len(request.id) <= MAX_ID_CHARS:
            reason = f"a trace has an id of 1 to {MAX_ID_CHARS} characters"
        elif request.layers_per_span > MAX_LAYERS_PER_SPAN:
            reason = f"layers_per_span is {request.layers_per_span}, more than {MAX_LAYERS_PER_SPAN}"
        else:
            reason = self._records.switch(
                request.id, request.lease_s, request.layers_per_span, memory=request.has_memory
            )
            if self._records.has_memory:
                self._sampler.start()
        return trace_pb2.TraceReply(
            reason=reason,
            received_ns=received,
            rank=self._node.rank,
            name=self._node.name,
            incarnation=self._node.incarnation,
            sent_ns=time.perf_counter_ns(),
        )

    def pull(
        self, request: trace_pb2.PullTraceRequest, context: grpc.ServicerContext
    ) -> Iterator[trace_pb2.TraceChunk]:
        """All records, CHUNK_RECORDS at a time; one chunk at least."""
        found = self._records.pull(request.id)
        if found is None:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "there is no such trace here any more: its lease ended, or another began",
            )
            raise AssertionError("abort raises")
        records, num_dropped = found
        yield trace_pb2.TraceChunk(num_dropped=num_dropped)
        for first in range(0, len(records), CHUNK_RECORDS):
            yield trace_pb2.TraceChunk(records=map(to_message, records[first : first + CHUNK_RECORDS]))

"""The running thing: nodes, the ring, the head and the HTTP API."""

import os

# gRPC reads these when it is imported, so they stand where every module of ours passes first.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a peer that leaves is our business, not the terminal's
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# The threads that wait for messages poll the sockets themselves, where the event engine would hand each from
# thread to thread: a fifth less CPU and latency (tests/benchmarks/hop.py). A later gRPC may ignore it.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

"""A process with the receiving end of edges, for the tests that stop or kill one.

    python -m tests.edge_peer [PORT]

prints its port, then one line per event, and ends when its stdin does.
"""

from __future__ import annotations

import sys

from cluster.ring import EdgeService, IncomingFrame
from cluster.rpc import make_server
from proto import ring_pb2

TOKEN = "token"


def say(*words: object) -> None:
    print(*words, flush=True)


def on_frame(incoming: IncomingFrame) -> None:
    say("frame", incoming.frame.seq, sum(len(tensor.data) for tensor in incoming.tensors))
    incoming.consume()


def main() -> None:
    service = EdgeService(
        accept=lambda _hello: None,
        on_frame=on_frame,
        on_edge_down=lambda hello, reason: say("down", hello.from_rank, reason),
        beat=lambda: ring_pb2.Beat(progress=42),
        incarnation=1,
    )
    port_wanted = sys.argv[1] if len(sys.argv) > 1 else "0"
    server, port = make_server(f"127.0.0.1:{port_wanted}", [service.add_to], TOKEN, max_workers=8)
    server.start()
    say(port)
    sys.stdin.read()
    service.close()
    server.stop(None).wait(10.0)


if __name__ == "__main__":
    main()

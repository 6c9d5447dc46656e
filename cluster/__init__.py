"""The running thing: nodes, the ring, the head and the HTTP API."""

"""The HTTP process: OpenAI's endpoints in front of the head's gRPC service."""

"""Which running ring a command means: --url, or the API address of --config."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from urllib.parse import urlsplit

from cluster.config import ClusterConfig, load_config
from cluster.errors import EXIT_USAGE, UserError
from deploy.client import Client

DEFAULT_URL = "http://127.0.0.1:8080"
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # what to connect to


def add_target(parser: argparse.ArgumentParser) -> None:
    """The two options; `client_of` reads them."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--url", help=f"where the ring's API is (default {DEFAULT_URL})")
    group.add_argument("--config", type=Path, help="take address and API key from a cluster file")


def client_of(args: argparse.Namespace) -> Client:
    """Raises UserError for a URL that is none, ConfigError for the file."""
    if args.config is not None:
        return client_for(load_config(args.config))
    url = args.url or DEFAULT_URL
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme != "http" or parts.path.rstrip("/") not in ("", "/v1"):
        raise UserError(f"--url {url} is not of the form {DEFAULT_URL}", EXIT_USAGE)
    keys = [key.strip() for key in os.environ.get("MACRAME_API_KEYS", "").split(",")]
    return Client(host, 80 if port is None else port, keys[0] or None)


def client_for(config: ClusterConfig) -> Client:
    """A client with the config's first key, if it has any."""
    keys = config.api_keys()
    return Client(
        ANY_ADDRESS.get(config.api.host, config.api.host), config.api.port, keys[0] if keys else None
    )

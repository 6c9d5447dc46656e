from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.errors import EXIT_USAGE

ALL_KEYS = {
    "model": "mlx-community/Qwen3-1.7B-8bit",
    "context": 8192,
    "concurrency": 1,
    "max_batch_size": None,
    "prefill_chunk": None,
    "strategy": "optimal",
    "objective": "latency",
    "nodes": [
        {
            "name": "mini1",
            "host": "mini1.local",
            "port": 50051,
            "chip": "Apple M4",
            "gpu_cores": 10,
            "memory_gb": 16,
            "max_memory_gb": 12,
            "layers": "0:10",
            "use": True,
        },
        {"name": "mini2", "host": "mini2.local"},
    ],
    "links": [{"between": ["mini1", "mini2"], "latency_ms": 0.4, "bandwidth_gbit_s": 10}],
    "api": {"host": "127.0.0.1", "port": 8080, "keys_file": None, "queue": 64, "queue_timeout_s": 300},
    "security": {"token_file": None, "tls": {"ca": None, "cert": None, "key": None}},
    "load": {"quantize": None, "kv_bits": None, "adapters": []},
    "stall_timeout_s": 120,
}


def write(folder: Path, document: Any, name: str = "cluster.json") -> Path:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def load(folder: Path, **overrides: Any) -> ClusterConfig:
    return load_config(write(folder, {"model": "m", "nodes": [{"host": "localhost"}]} | overrides))


def nodes(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"nodes": [{"host": f"h{i}"} | entry for i, entry in enumerate(entries)]}


# -- what is read -----------------------------------------------------------------------------------------
def test_all_keys_of_the_design_are_read(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ALL_KEYS))
    node = config.nodes[0]
    assert (node.rank, node.name, node.host, node.port, node.chip, node.gpu_cores) == (
        *(0, "mini1", "mini1.local", 50051, "Apple M4", 10),
    )
    assert (node.memory_gb, node.max_memory_gb, node.layers, node.use) == (16.0, 12.0, (0, 10), True)
    assert config.links[0].between == ("mini1", "mini2")
    assert (config.links[0].latency_ms, config.links[0].bandwidth_gbit_s) == (0.4, 10.0)
    assert (config.api.port, config.api.queue, config.stall_timeout_s) == (8080, 64, 120.0)
    assert config.silence_timeout_s == 1.0


def test_defaults_are_those_of_the_design(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.context, config.concurrency, config.strategy, config.objective) == (
        None,
        1,
        "optimal",
        "latency",
    )
    assert (config.nodes[0].name, config.nodes[0].port, config.nodes[0].use) == ("localhost", 50051, True)
    assert (config.api.host, config.api.port, config.api.queue) == ("127.0.0.1", 8080, 64)
    assert (config.stall_timeout_s, config.links) == (120.0, ())
    assert config.model_dir_base == tmp_path.resolve()


def test_zero_is_kept_where_it_means_something(tmp_path: Path) -> None:
    config = load(tmp_path, api={"port": 0, "queue": 0}, **nodes({"reserve_gb": 0}))
    assert (config.api.port, config.api.queue, config.nodes[0].reserve_gb) == (0, 0, 0.0)


def test_yaml_says_the_same_as_json(tmp_path: Path) -> None:
    text = """
model: mlx-community/Qwen3-1.7B-8bit
context: 8192
nodes:
  - {name: mini1, host: mini1.local, chip: Apple M4, gpu_cores: 10,
     memory_gb: 16, max_memory_gb: 12, layers: 0:10}
  - name: mini2
    host: mini2.local
links:
  - between: [mini1, mini2]
    latency_ms: 0.4
    bandwidth_gbit_s: 10
"""
    from_yaml = load_config(write(tmp_path, text, "cluster.yaml"))
    from_json = load_config(write(tmp_path, ALL_KEYS))
    assert from_yaml.nodes == from_json.nodes
    assert from_yaml.digest == from_json.digest


def test_yaml_layers_are_no_base_60_number(tmp_path: Path) -> None:
    text = "model: m\nnodes:\n  - {host: a, layers: 10:20, memory_gb: 010}\n"
    node = load_config(write(tmp_path, text, "c.yml")).nodes[0]
    assert (node.layers, node.memory_gb) == ((10, 20), 10.0)


def test_names_are_hosts_where_those_differ(tmp_path: Path) -> None:
    config = load(tmp_path, nodes=[{"host": "a"}, {"host": "b"}, {"host": "b", "port": 2}])
    assert [node.name for node in config.nodes] == ["a", "node1", "node2"]


def test_ipv6_hosts(tmp_path: Path) -> None:
    assert load(tmp_path, nodes=[{"host": "::1"}]).nodes[0].address == "[::1]:50051"
    assert load(tmp_path).nodes[0].address == "localhost:50051"


def test_the_model_may_be_given_from_outside(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, {"nodes": [{"host": "a"}]}), model="other").model == "other"
    config = load(tmp_path).with_overrides(context=5, concurrency=2, strategy="uniform", objective="ttft")
    assert (config.context, config.concurrency, config.strategy, config.objective) == (
        5,
        2,
        "uniform",
        "ttft",
    )
    assert config.with_overrides() == config


# -- mistakes ---------------------------------------------------------------------------------------------
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"contxt": 5}, 'unknown key "contxt" with the value 5, the nearest known key is "context"'),
    (nodes({"prot": 1}), r'nodes\[0\]: unknown key "prot" with the value 1, the nearest known key is "port"'),
    ({"api": {"prt": 1}}, 'api: unknown key "prt" with the value 1, the nearest known key is "port"'),
    ({"zzzzz": 1}, 'unknown key "zzzzz" with the value 1, known keys are model, context'),
    ({"security": {"tls": {"certs": 1}}}, r'security\.tls: unknown key "certs" .* key is "cert"'),
    ({"model": 3}, "model = 3 must be a non-empty string"),
    ({"model": "  "}, 'model = "  " must be a non-empty string'),
    ({"model": "a\nb"}, r'model = "a\\nb" must be text without line breaks and control characters'),
    ({"model": None}, "model is missing: name a folder or a hub id"),
    ({"context": 0}, "context = 0 must be a whole number from 1"),
    ({"context": -8}, "context = -8 must be a whole number"),
    ({"context": 8.5}, "context = 8.5 must be a whole number"),
    ({"context": "8192"}, 'context = "8192" must be a whole number'),
    ({"concurrency": True}, "concurrency = true must be a whole number"),
    ({"concurrency": 0}, "concurrency = 0 must be a whole number from 1"),
    ({"max_batch_size": 0}, "max_batch_size = 0 must be a whole number from 1 to 256"),
    ({"max_batch_size": 257}, "max_batch_size = 257 must be a whole number from 1 to 256"),
    ({"prefill_chunk": 0}, "prefill_chunk = 0 must be a whole number from 1 to 4096"),
    ({"prefill_chunk": 5000}, "prefill_chunk = 5000 must be a whole number from 1 to 4096"),
    ({"prefill_chunk": "auto"}, 'prefill_chunk = "auto" must be a whole number from 1 to 4096'),
    ({"strategy": "optimum"}, 'strategy = "optimum" must be one of .*, the nearest is "optimal"'),
    ({"objective": 3}, "objective = 3 must be one of latency, throughput, ttft"),
    ({"nodes": []}, r"nodes = \[\] must list at least one node"),
    ({"nodes": {}}, r"nodes = \{\} must be a list"),
    ({"nodes": ["a"]}, r'nodes\[0\] = "a" must be a mapping'),
    ({"nodes": [{}]}, r"nodes\[0\]\.host is missing: it must be a host name or an address"),
    (
        nodes({"host": "a:50051"}),
        r'nodes\[0\]\.host = "a:50051" must be a bare host name .* the port has a key',
    ),
    (nodes({"host": "a b"}), "must be a bare host name"),
    (nodes({"host": "http://a"}), "must be a bare host name"),
    (nodes({"host": 7}), r"nodes\[0\]\.host = 7 must be a non-empty string"),
    (nodes({"port": 0}), r"nodes\[0\]\.port = 0 must be a whole number from 1 to 65535"),
    (nodes({"port": 65536}), "port = 65536 must be a whole number from 1 to 65535"),
    (nodes({"port": "x"}), 'port = "x" must be a whole number'),
    (nodes({"memory_gb": -1}), r"nodes\[0\]\.memory_gb = -1 must be a number above 0"),
    (nodes({"memory_gb": 0}), "memory_gb = 0 must be a number above 0"),
    (nodes({"memory_gb": "16 GB"}), 'memory_gb = "16 GB" must be a number'),
    (nodes({"memory_gb": float("nan")}), "memory_gb = NaN must be a number"),
    (nodes({"memory_gb": float("inf")}), "memory_gb = Infinity must be a number"),
    (nodes({"gpu_cores": 1.5}), "gpu_cores = 1.5 must be a whole number"),
    (nodes({"use": "no"}), r'nodes\[0\]\.use = "no" must be true or false'),
    (nodes({"layers": "10"}), r'nodes\[0\]\.layers = "10" must be two whole numbers'),
    (nodes({"layers": "5:5"}), 'layers = "5:5" must be two whole numbers'),
    (nodes({"layers": "-1:5"}), 'layers = "-1:5" must be two'),
    (nodes({"layers": [0, 5]}), r"layers = \[0, 5\] must be a non-empty string"),
    (
        nodes({"name": "x"}, {"name": "x"}),
        r'nodes\[0\] and nodes\[1\] are both named "x"',
    ),
    (nodes({"host": "a"}, {"host": "A"}), r'nodes\[1\] has the host "A" and port 50051 of nodes\[0\]'),
    (nodes({"host": "localhost"}, {"host": "127.0.0.1"}), "give each node a port of its own"),
    (nodes({"use": False}), "at least one must be used"),
    (nodes({"use": False}, {}), r"nodes\[0\]\.use = false: rank 0 is the head, without which no ring runs"),
    (
        {"links": [{"between": ["localhost"]}]},
        r"links\[0\]\.between = .* must be a list of two different node names",
    ),
    ({"links": [{"between": ["localhost", "localhost"]}]}, "two different node names"),
    ({"links": [{"between": ["localhost", "x"]}]}, 'names "x", which is no node: the nodes are localhost'),
    (
        nodes({"host": "a"}, {"host": "b"})
        | {"links": [{"between": ["a", "b"], "bandwidth_gbit_s": 1e-9}], "security": {"token_file": "t"}},
        r"links\[0\]\.bandwidth_gbit_s = .* must be at least 1e-06",
    ),
    ({"links": [{}]}, r"links\[0\]\.between is missing"),
    ({"silence_timeout_s": 0.2}, "silence_timeout_s = 0.2 must be at least 0.5"),
    ({"stall_timeout_s": 0}, "stall_timeout_s = 0 must be a number above 0"),
    ({"api": {"port": 50051}}, r"api\.port = 50051 is the port of nodes\[0\] on the same machine"),
    ({"api": {"host": "0.0.0.0", "port": 50051}}, r"api\.port = 50051 is the port of nodes\[0\]"),
    ({"api": []}, r"api = \[\] must be a mapping"),
    ({"api": {"queue": -1}}, r"api\.queue = -1 must be a whole number from 0"),
    (
        {"api": {"queue_timeout_s": 0}},
        r"api\.queue_timeout_s = 0 must be a number above 0 and at most",
    ),
    ({"api": {"queue_timeout_s": "1m"}}, r'api\.queue_timeout_s = "1m" must be a number above 0'),
    ({"load": {"kv_bits": 5}}, r"load\.kv_bits = 5 must be one of 4, 8"),
    ({"load": {"kv_bits": "8"}}, r'load\.kv_bits = "8" must be a whole number'),
    ({"load": {"kv_group_size": 48}}, r"load\.kv_group_size = 48 must be one of 32, 64, 128"),
    ({"security": {"tls": {"cert": "c.pem"}}}, r"security\.tls\.ca is missing: .* takes ca, cert and key"),
    (
        {"security": {"tls": {"ca": "a", "cert": "c", "key": "{host}.key"}}},
        r'security\.tls\.key = "{host}\.key" may contain {name} and {rank} in braces, nothing else',
    ),
    (
        {"security": {"tls": {"ca": "a", "cert": "{name!r}", "key": "k"}}},
        r"security\.tls\.cert = .* nothing else",
    ),
    ({"security": {"tls": {"ca": "a", "cert": "{", "key": "k"}}}, r"security\.tls\.cert = .* nothing else"),
    ({"security": {"tls": {"ca": "{name}", "cert": "c", "key": "k"}}}, r"tls\.ca = .* is the same for all"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_a_mistake_is_one_sentence_with_file_key_and_value(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, **overrides)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "cluster.json"))
    assert "\n" not in text
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("api", "timeout_s"),
    [({}, 300.0), ({"queue_timeout_s": None}, None), ({"queue_timeout_s": 2.5}, 2.5)],
)
def test_how_long_a_request_may_wait(
    tmp_path: Path, api: dict[str, float | None], timeout_s: float | None
) -> None:
    assert load(tmp_path, api=api).api.queue_timeout_s == timeout_s


def test_two_links_between_the_same_nodes(tmp_path: Path) -> None:
    links = [{"between": ["h0", "h1"]}, {"between": ["h1", "h0"]}]
    with pytest.raises(ConfigError, match=r"links\[1\]\.between = .* is a pair that an earlier link has"):
        load(tmp_path, links=links, **nodes({}, {}))


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ('{"model": "m",\n "nodes": [}', "c.json", "is not valid JSON: expecting value at line 2, column 12"),
        ("", "c.json", "is not valid JSON"),
        ('{"model": "m", "model": "n"}', "c.json", 'the key "model" is given twice, the second time as "n"'),
        ("3", "c.json", "the file = 3 must be a mapping"),
        ("", "c.yaml", "c.yaml is empty: write a cluster file"),
        ("[" * 100_000, "c.json", "is nested too deeply"),
        ("model: m\nnodes: [", "c.yaml", "is not valid YAML: .* at line 2"),
        ("model: m\nmodel: n\n", "c.yaml", 'the key "model" is given twice at line 2'),
        ("model: m\n1: n\n", "c.yaml", "the key 1 is not text at line 2"),
        ("a: !!python/object:os.system x", "c.yaml", "is not valid YAML"),
        ("model: \x01", "c.yaml", "is not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_parsed(tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text, name))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.json does not exist"):
        load_config(tmp_path / "no.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"model": "\xe9"}')
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path / "latin.json")


# -- digest -----------------------------------------------------------------------------------------------
def test_the_digest_is_of_what_all_nodes_must_agree_on(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    digest = load(tmp_path).digest
    assert load(other).digest == digest
    assert load(tmp_path, security={"token_file": "t"}, api={"keys_file": "k"}).digest == digest
    assert load(tmp_path, security={"tls": {"ca": "a", "cert": "b", "key": "c"}}).digest == digest
    assert load(tmp_path, model=str(tmp_path / "m")).digest == digest
    assert load(tmp_path, context=5).digest != digest
    assert load(tmp_path, model="n").digest != digest
    assert load(tmp_path, **nodes({"port": 5})).digest != digest


def test_a_folder_has_the_same_digest_by_a_relative_and_an_absolute_path(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    here = load(tmp_path, model="models/m").digest
    assert load(tmp_path, model=str(folder)).digest == here, "macrame up hands out absolute paths"
    assert load(tmp_path, model="org/m").digest != load(tmp_path, model="other/m").digest, "hub ids"

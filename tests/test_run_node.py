"""run_node as its user sees it: what it refuses, with which exit code and sentence. Real processes."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from cluster.dry_run import main as dry_run
from cluster.run_node import main
from deploy.status import render
from tests.node_process import Ended, finish, node, run_node, start_node, wait_line, write_cluster
from tests.ring_processes import free_ports
from tests.tiny_models import write_checkpoint
from tests.waiting import is_in_time, wait_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers of which each has its own file."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return write_checkpoint("llama", directory, num_layers=5, max_shard_bytes=200_000)


@contextmanager
def listener() -> Iterator[int]:
    """A port that is in use."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


# -- arguments and the cluster file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rank", "2"], "--rank 2 is not in {config}, which has ranks 0 to 1"),
        (["--rank", "-1"], "--rank -1 is not in {config}, which has ranks 0 to 1"),
        (["--rank", "1"], "rank 1 has use: false in {config}; set it to true to run it"),
        (["--rank", "one"], "argument --rank: invalid int value: 'one'; see run_node --help"),
        ([], "the following arguments are required: --rank; see run_node --help"),
        *(
            (["--rank", "0", "--wait-s", value], f"argument --wait-s: {value!r} is no number of seconds; ")
            for value in ("soon", "-1", "nan", "inf")
        ),
    ],
)
def test_wrong_arguments(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    config = write_cluster(tmp_path, "m", node(), node(use=False))
    ended = run_node("--config", config, *arguments)
    assert ended.code == 3
    assert ended.sentence.startswith("run_node: " + sentence.format(config=config))


def test_what_no_restart_mends_ends_with_0_under_launchd(tmp_path: Path) -> None:
    missing = ("--rank", "0", "--config", tmp_path / "none.json", "--under-launchd")
    ended = run_node(*missing)
    assert (ended.code, "does not exist" in ended.sentence) == (0, True), ended
    assert run_node(*missing, "--check").code == 3  # `macrame service install` asks that
    assert main(["--rank", "one", "--under-launchd"]) == 0
    with pytest.raises(SystemExit) as end:
        main(["--rank", "one"])
    assert end.value.code == 3


def test_no_config_and_one_that_is_not_there(tmp_path: Path) -> None:
    required = "run_node: the following arguments are required: --config; see run_node --help"
    assert run_node("--rank", 0) == Ended(3, required)
    missing = tmp_path / "none.json"
    assert run_node("--rank", 0, "--config", missing) == Ended(
        3, f"run_node: {missing} does not exist: give --config the path of a cluster file"
    )


def test_two_nodes_in_one_place(tmp_path: Path) -> None:
    first = node()
    config = write_cluster(tmp_path, "m", first, {**first, "host": "localhost"})
    assert run_node("--rank", 0, "--config", config) == Ended(
        3,
        f'run_node: {config}: nodes[1] has the host "localhost" and port {first["port"]} of nodes[0]: '
        "give each node a port of its own",
    )


def test_beyond_loopback_needs_a_token(tmp_path: Path) -> None:
    config = write_cluster(tmp_path, "m", node(host="0.0.0.0"))
    assert run_node("--rank", 0, "--config", config) == Ended(
        3,
        f'run_node: {config}: nodes[0].host = "0.0.0.0" is reachable from other machines, which needs '
        "certificates or a cluster token: set security.tls (macrame certs make), or security.token_file or "
        "MACRAME_TOKEN",
    )


def test_check_starts_nothing(tmp_path: Path) -> None:
    good = write_cluster(tmp_path, "m", node())
    assert run_node("--rank", 0, "--config", good, "--check") == Ended(0, "")
    bad = write_cluster(tmp_path, "m", node(host="0.0.0.0"))
    assert run_node("--rank", 0, "--config", bad, "--check").code == 3


def test_an_unknown_choice_of_kernels_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = write_cluster(tmp_path, "m", node())
    ended = run_node("--rank", 0, "--config", config, "--check", env={"MACRAME_KERNELS": "fast"})
    assert ended == Ended(3, "run_node: MACRAME_KERNELS is 'fast': say on, off or emulate.")


@pytest.mark.parametrize("name", ["kernels", "planner", "proto", "shard_loader"])
def test_a_package_that_hides_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    config = write_cluster(tmp_path, "m", node())
    command = ["--rank", 0, "--config", config]
    ended = run_node(*command, cwd=tmp_path)
    assert ended == Ended(
        1,
        f"run_node: another package named {name!r} in {tmp_path / name} hides macrame's; install macrame in "
        "an environment of its own",
    )


def test_a_hostfile_is_run_with_a_model(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text('[{"ssh": "mini1", "ips": ["10.0.0.1"]}, {"ssh": "mini2", "ips": ["10.0.0.2"]}]')
    assert run_node("--rank", 0, "--config", path) == Ended(
        3,
        f"run_node: {path}: model is missing: name a folder or a hub id there, or give --model to run_node "
        "and plan-dry-run",
    )
    ended = run_node("--rank", 0, "--config", path, "--model", "m")
    assert ended.code == 3
    assert "which needs certificates or a cluster token" in ended.sentence  # nothing else is amiss


def test_a_model_on_the_command_line_is_the_heads_the_workers_and_the_plans(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (api_port,) = free_ports(1)
    nodes = [node(layers="0:3"), node(layers="3:5")]
    config = write_cluster(tmp_path, "org/nothing", *nodes, api={"port": api_port})
    other = shutil.copytree(model, tmp_path / "other")
    arguments = ("--config", config, "--model")
    with ExitStack() as stack:

        def start(rank: int, path: Path) -> subprocess.Popen[str]:
            process = start_node("--rank", rank, *arguments, path)
            stack.callback(finish, process)
            stack.callback(process.terminate)
            return process

        head, stranger = start(0, model), start(1, other)
        wait_line(head, "runs with another config")
        stranger.terminate()
        stranger.wait()
        start(1, model)
        wait_line(head, "] ok")
        url = f"http://127.0.0.1:{api_port}"
        wait_for(lambda: is_ok(url), 20.0)
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
        plan = httpx.get(f"{url}/v1/cluster").json()["plan"]
    assert dry_run([*map(str, arguments), str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == plan["digest"]


def is_ok(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


# -- plans ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (("0:3", "2:5"), "layers 2:5 of node1 overlap those of node0, which end at 3"),
        pytest.param(("0:2", "3:5"), "layers 2:3 are forced onto no node: ", marks=pytest.mark.long),
        pytest.param(("0:2", "2:4"), "layers 4:5 are forced onto no node: ", marks=pytest.mark.long),
        pytest.param(
            *(("0:2", "2:6"), "layers 2:6 of node1 exceed the model, which has the layers 0:5"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_layers_that_do_not_tile_the_model(
    layers: tuple[str, str], sentence: str, tmp_path: Path, model: Path
) -> None:
    config = write_cluster(tmp_path, model, *(node(layers=part) for part in layers))
    ended = run_node("--rank", 0, "--config", config)
    assert ended.code == 3
    assert ended.sentence.startswith(f"run_node: {sentence}")


def test_a_model_that_does_not_fit(tmp_path: Path, model: Path) -> None:
    config = write_cluster(tmp_path, model, node(memory_gb=0.0005))
    ended = run_node("--rank", 0, "--config", config)
    assert ended.code == 2
    assert ended.sentence.startswith(f"run_node: {model} needs 0.9 MB for its weights and ")
    assert "and 1.4 MB are missing; add a node with " in ended.sentence
    assert ended.text.count("are missing") == 1


def test_a_model_that_does_not_fit_is_forced(tmp_path: Path, model: Path) -> None:
    """It loads, answers, and says what it risks; the excluded node is not waited for."""
    (api_port,) = free_ports(1)
    config = write_cluster(tmp_path, model, node(memory_gb=0.0005), node(), api={"port": api_port})
    head = start_node("--rank", 0, "--config", config, "--force", "--exclude", "node1")
    with ExitStack() as stack:
        stack.callback(finish, head)
        stack.callback(head.terminate)
        wait_line(head, "FORCED, IT DOES NOT FIT: ")
        wait_line(head, "] ok")
        url = f"http://127.0.0.1:{api_port}"
        wait_for(lambda: is_ok(url), 20.0)
        health = httpx.get(f"{url}/health").json()
        assert health["status"] == "ok"
        (warning,) = health["warnings"]
        assert warning.startswith("node0 is given 1,")
        assert "bytes more than its budget of 283,500 bytes" in warning
        cluster = httpx.get(f"{url}/v1/cluster").json()
        assert (cluster["plan"]["fits"], cluster["warnings"]) == (False, [warning])
        assert f"WARNING: {warning}" in render(cluster)
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=asked, timeout=20).status_code == 200


@pytest.mark.parametrize(
    ("rank", "flags", "sentence"),
    [
        (
            1,
            ["--force"],
            "--exclude, --keep-order and --force are for rank 0, which plans; rank 1 has no use",
        ),
        (0, ["--exclude", "nod1"], '--exclude nod1: "nod1" is no node, the nearest is "node1"'),
    ],
)
def test_choices_are_the_heads_and_are_checked(
    rank: int, flags: list[str], sentence: str, tmp_path: Path, model: Path
) -> None:
    config = write_cluster(tmp_path, model, node(), node())
    ended = run_node("--rank", rank, "--config", config, *flags)
    assert (ended.code, ended.sentence[: len(sentence) + 10]) == (3, f"run_node: {sentence}")


# -- ports ----------------------------------------------------------------------------------------------


def test_a_busy_port_of_the_node(tmp_path: Path, model: Path) -> None:
    with listener() as port:
        config = write_cluster(tmp_path, model, node(port=port))
        ended = run_node("--rank", 0, "--config", config)
    assert ended == Ended(
        1,
        f"run_node: port {port} of 127.0.0.1 is in use by another process; stop it, or choose another port "
        "in the config",
    )


def test_a_busy_http_port_ends_the_node(tmp_path: Path, model: Path) -> None:
    with listener() as port:
        config = write_cluster(tmp_path, model, node(), api={"port": port})
        ended = run_node("--rank", 0, "--config", config)
    assert ended == Ended(
        1,
        f"run_node: cannot listen on 127.0.0.1:{port}: Address already in use; choose another api.port, or "
        "stop what uses it",
    )
    assert ended.text.count("cannot listen") == 1


# -- model files ----------------------------------------------------------------------------------------


def broken(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "broken"))


def run_alone(tmp_path: Path, model: Path) -> Ended:
    return run_node("--rank", 0, "--config", write_cluster(tmp_path, model, node()), "--no-api")


def test_no_model_folder(tmp_path: Path) -> None:
    model = tmp_path / "nowhere"
    assert run_alone(tmp_path, model) == Ended(
        1, f"run_node: there is no model folder {model}, and {str(model)!r} is no hub id"
    )


def test_a_truncated_file(tmp_path: Path, model: Path) -> None:
    file = broken(model, tmp_path) / "model-00003-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    ended = run_alone(tmp_path, file.parent)
    assert ended.code == 1
    assert str(file) in ended.sentence
    assert "download" in ended.sentence


def test_a_missing_file_of_the_index(tmp_path: Path, model: Path) -> None:
    file = broken(model, tmp_path) / "model-00003-of-00005.safetensors"
    file.unlink()
    ended = run_alone(tmp_path, file.parent)
    assert ended.code == 1
    assert f"{file} is missing, and layers 0:5 read model.layers." in ended.sentence


def test_a_missing_tensor(tmp_path: Path, model: Path) -> None:
    index = broken(model, tmp_path) / "model.safetensors.index.json"
    name = "model.layers.2.mlp.up_proj.weight"
    rename(index.parent, name, "model.layers.2.mlp.up_prof.weight")
    ended = run_alone(tmp_path, index.parent)
    assert ended == Ended(1, f"run_node: loading layers 0:5 failed: the checkpoint lacks tensor {name!r}")


def rename(model: Path, old: str, new: str) -> None:
    """Gives a tensor another name of the same length in every file that knows it."""
    assert len(old) == len(new)
    for file in model.iterdir():
        file.write_bytes(file.read_bytes().replace(old.encode(), new.encode()))


# -- waiting --------------------------------------------------------------------------------------------


def test_the_head_gives_up_on_a_missing_node(tmp_path: Path, model: Path) -> None:
    absent = node(layers="2:5")
    config = write_cluster(tmp_path, model, node(layers="0:2"), absent)
    started = time.monotonic()
    ended = run_node("--rank", 0, "--config", config, "--no-api", "--wait-s", 2)
    assert time.monotonic() - started > 2.0
    assert is_in_time(time.monotonic() - started, 20.0)
    assert ended.code == 4
    assert ended.sentence.startswith("run_node: waited long enough (--wait-s): ")
    assert ended.sentence.endswith(f"rank 1 (node1, 127.0.0.1:{absent['port']}) is not there yet")


def test_a_worker_gives_up_on_its_head(tmp_path: Path, model: Path) -> None:
    (port,) = free_ports(1)
    config = write_cluster(tmp_path, model, node(port=port), node())
    assert run_node("--rank", 1, "--config", config, "--wait-s", 2) == Ended(
        4,
        f"run_node: the head at 127.0.0.1:{port} did not call within 2 s (--wait-s); start rank 0 there",
    )

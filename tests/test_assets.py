"""The files of the web page as the server sends them, and what guards them; tests/test_page.py runs them."""

from __future__ import annotations

import re
import socket
import tomllib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from cluster.api.assets import FOLDER, INDEX, PREFIX, is_asset, read_assets
from planner.plan import Plan
from planner.planned_from import PlannedFrom
from planner.solver import make_plan
from proto import head_pb2
from tests.api_server import Served, started, wait_healthy
from tests.scripted_ring import ScriptedRing
from tests.test_rebalance import three
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(FOLDER.glob("*.js"))


def policy(reply: httpx.Response) -> dict[str, list[str]]:
    parts = [part.split() for part in reply.headers["content-security-policy"].split(";")]
    return {name: values for name, *values in parts}


def test_the_page_is_at_the_root_with_a_policy_that_runs_nothing_else(served: Served) -> None:
    reply = served.http.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.text == (FOLDER / INDEX).read_text(encoding="utf-8")
    allowed = policy(reply)
    assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == ["'none'"]
    assert allowed["frame-ancestors"] == ["'none'"]
    for kind in ("script-src", "style-src", "img-src", "connect-src"):
        assert allowed[kind] == ["'self'"], kind
    assert allowed["require-trusted-types-for"] == ["'script'"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["cache-control"] == "no-cache"
    assert served.http.head("/").headers["content-length"] == str(len(reply.content))


@pytest.mark.parametrize("name", sorted(read_assets()))
def test_every_file_has_its_type_and_a_tag(served: Served, name: str) -> None:
    reply = served.http.get(f"{PREFIX}{name}")
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert reply.headers["content-type"].startswith(kinds[Path(name).suffix])
    assert reply.content == (FOLDER / name).read_bytes()
    assert policy(reply)["script-src"] == ["'self'"]
    tag = reply.headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = served.http.get(f"{PREFIX}{name}", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert served.http.get(f"{PREFIX}{name}", headers={"if-none-match": '"other"'}).status_code == 200


def raw_status(served: Served, path: str) -> int:
    """Of a path that no client would send as it is."""
    with socket.create_connection(("127.0.0.1", served.api.port), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return int(connection.recv(64).split()[1])


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page", "/page/nothing.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py"],
)
def test_nothing_else_is_sent(served: Served, path: str) -> None:
    assert raw_status(served, path) == 404


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/v1/cluster/why"])
def test_without_keys_a_foreign_host_gets_nothing_of_the_page(refusing: Served, path: str) -> None:
    reply = refusing.http.get(path, headers={"host": "evil.example"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")


def test_with_keys_the_shell_is_public_and_all_data_is_not(tmp_path: Path) -> None:
    ring = ScriptedRing()
    with ExitStack() as stack:
        stack.callback(ring.close)
        _, http = stack.enter_context(started(tmp_path, f"127.0.0.1:{ring.port}", MACRAME_API_KEYS="one-key"))
        wait_healthy(http)
        for path in ("/", "/page/main.js", "/page/page.css"):
            assert http.get(path).status_code == 200
        assert http.get("/page/nothing").status_code == 404
        for path in (
            "/v1/cluster",
            "/v1/cluster/why",
            "/v1/cluster/logs",
            "/metrics",
            "/pages",
            "/pageant/x",
        ):
            assert http.get(path).status_code == 401, path
        assert http.post("/", json={}).status_code == 405
        assert http.post("/v1/chat/completions", json={}).status_code == 401


def test_which_paths_are_of_the_page() -> None:
    assert all(map(is_asset, ("/", "/page/", "/page/main.js", "/page/../x")))  # the last one is no file
    assert not any(map(is_asset, ("", "//", "/page", "/pages/x", "/v1/cluster", "/v1/page/x", "page/x")))


# -- what the files hold ----------------------------------------------------------------------------------


def test_the_page_names_only_files_of_its_own() -> None:
    html = (FOLDER / INDEX).read_text(encoding="utf-8")
    named = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert named
    for target in named:
        assert target.startswith("#") or (FOLDER.parent / target).is_file(), target
    for script in SCRIPTS:
        for target in re.findall(r'from "([^"]*)"', script.read_text(encoding="utf-8")):
            assert target.startswith("./"), (script.name, target)
            assert (FOLDER / target).is_file(), (script.name, target)


def test_nothing_of_the_page_comes_from_elsewhere() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        found = [url for url in re.findall(r"https?://[^\s\"'`)]+", text) if "www.w3.org/2000/svg" not in url]
        assert not [url for url in found if "\\" not in url], path.name  # a pattern of addresses is none
        assert not re.search(r"@import|url\(", text), path.name


def test_nothing_is_inline_and_no_text_becomes_markup() -> None:
    html = (FOLDER / INDEX).read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]* src=)", html)
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc"
    )
    for script in SCRIPTS:
        assert not re.search(forbidden, script.read_text(encoding="utf-8")), script.name


def test_the_key_is_never_kept_beyond_the_tab() -> None:
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert "document.cookie" not in text
        if "localStorage" in text:
            assert script.name == "theme.js"


def test_the_files_are_in_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "api/page/*" in project["tool"]["setuptools"]["package-data"]["cluster"]
    assert not [path for path in FOLDER.iterdir() if path.is_dir()]
    assert read_assets().keys() == {path.name for path in FOLDER.iterdir()}


def colours(theme: str) -> dict[str, str]:
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root[^{]*\{([^}]*)\}", css)[:2]
    own = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))
    return own | (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", dark)) if theme == "dark" else {})


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_what_it_is_on(theme: str) -> None:
    own = colours(theme)
    pairs = [(ink, paper) for ink in ("ink", "soft", "bad", "warn") for paper in ("paper", "card", "code")]
    pairs += [("on-accent", "accent"), ("accent", "card"), ("ink", "tint"), ("bad", "bad-tint")]
    for ink, paper in pairs:
        low, high = sorted((luminance(own[ink]), luminance(own[paper])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)


# -- why the plan is so -----------------------------------------------------------------------------------


def give_plan(ring: ScriptedRing, planned: PlannedFrom) -> Plan:
    plan = make_plan(planned.model, planned.nodes, planned.links, planned.options)
    assert isinstance(plan, Plan)
    ring.head.planned_from = head_pb2.PlanningReply(planning_json=planned.to_json(), config_digest="abc")
    ring.plan_json = plan.to_json()
    return plan


def test_why_is_told_for_the_plan_that_runs(served: Served) -> None:
    reply = served.http.get("/v1/cluster/why")
    assert reply.status_code == 503
    assert reply.json()["error"]["message"] == "The head has no plan yet; ask again when it serves."
    planned = three(0.7, 0.7, 0.7)
    plan = give_plan(served.ring, planned)
    wait_for(lambda: served.http.get("/v1/cluster").json()["plan"] is not None)
    why = served.http.get("/v1/cluster/why").json()
    assert why["digest"] == plan.digest
    assert [node["node"] for node in why["nodes"]] == [part.node for part in plan.assignments]
    assert all(node["text"] for node in why["nodes"])
    assert why["help"]
    assert all(not line.startswith("what would help") and line == line.strip() for line in why["help"])
    assert why["lines"][0] == "why:"
    assert served.http.get("/v1/cluster/why").json() == why

    other = replace(planned, options=replace(planned.options, strategy="uniform"))
    plan = give_plan(served.ring, other)
    wait_for(lambda: served.http.get("/v1/cluster").json()["plan"]["strategy"] == "uniform")
    again = served.http.get("/v1/cluster/why").json()
    assert again["digest"] == plan.digest
    assert again["note"] == "what would help is told for the strategy optimal"
    assert again["help"] == []


def test_a_head_of_another_version_is_told_in_a_sentence(served: Served) -> None:
    plan = give_plan(served.ring, replace(three(0.7, 0.7, 0.7), links=()))
    served.ring.head.planned_from = head_pb2.PlanningReply(planning_json="{}", config_digest="abc")
    wait_for(lambda: (served.http.get("/v1/cluster").json()["plan"] or {}).get("digest") == plan.digest)
    reply = served.http.get("/v1/cluster/why")
    assert reply.status_code == 502
    assert reply.json()["error"]["message"] == (
        "The head says what cannot be read: planning.model is missing: "
        "the ring runs another version of macrame."
    )

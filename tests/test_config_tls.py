"""security.tls goes into a cluster file, and nothing else of its text changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.config_tls import with_tls

TLS = {"ca": "certs/ca.pem", "cert": "certs/{name}.pem", "key": "certs/{name}.key"}
JSON, YAML = Path("cluster.json"), Path("cluster.yaml")
NODES = '"nodes": [\n    {"host": "mini1.local"},   {"host": "mini2.local"}\n  ]'


def added(path: Path, text: str) -> str:
    new = with_tls(path, text, TLS)
    assert new is not None
    return new


def test_a_member_is_added_at_the_end_with_the_indentation_of_the_others() -> None:
    text = f'{{\n  "model": "m",\n  {NODES}\n}}\n'
    assert (
        added(JSON, text)
        == f'{{\n  "model": "m",\n  {NODES},\n  "security": {{"tls": {json.dumps(TLS)}}}\n}}\n'
    )


def test_a_file_of_one_line_stays_one_line() -> None:
    text = '{"model": "m", "nodes": [{"host": "a"}]}'
    assert added(JSON, text) == text[:-1] + f', "security": {{"tls": {json.dumps(TLS)}}}}}'


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        ('{"token_file": "t}"}', f'{{"token_file": "t}}", "tls": {json.dumps(TLS)}}}'),
        ("{}", f'{{"tls": {json.dumps(TLS)}}}'),
        ("null", f'{{"tls": {json.dumps(TLS)}}}'),
        ('{ "tls": null }', f'{{ "tls": {json.dumps(TLS)} }}'),
        (
            '{"tls": {"ca": null, "cert": null, "key": null}, "token_file": null}',
            f'{{"tls": {json.dumps(TLS)}, "token_file": null}}',
        ),
    ],
)
def test_a_security_section_that_is_there_is_kept(security: str, expected: str) -> None:
    text = f'{{"security": {security}, "model": "security", "nodes": [{{"host": "\\"security\\": {{"}}]}}'
    assert added(JSON, text) == text.replace(
        f'"security": {security}, "model"', f'"security": {expected}, "model"'
    )


def test_yaml_keeps_its_comments() -> None:
    text = "# two minis\nmodel: m  # small\nnodes:\n  - host: a\n"
    new = added(YAML, text)
    assert new.startswith(text)
    assert "security:\n  tls:\n    ca: certs/ca.pem\n" in new


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (YAML, "model: m\nnodes: [{host: a}]\nsecurity: {token_file: t}\n"),
        (YAML, "{model: m, nodes: [{host: a}]}\n"),
        (JSON, '{"model_name": "m", "devices": [{"hostname": "a"}]}'),
        (JSON, '[{"ssh": "a"}]'),
        (JSON, f'{{"model": "m", "nodes": [], "security": {{"tls": {json.dumps(TLS)}}}}}'),
        (JSON, '{"model": '),
    ],
)
def test_what_needs_a_person_is_left_alone(path: Path, text: str) -> None:
    assert with_tls(path, text, TLS) is None

"""What the documents show can be typed: commands exist and know their options, configs can be read."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import TOP_KEYS, read_config
from cluster.config_read import Table
from deploy.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_NAMES = {"run_node": "node", "plan-dry-run": "plan"}
_COMMAND = re.compile(r"^(?:sudo )?(?:[A-Z_]+=\S+ )*(macrame|run_node|plan-dry-run)( .*|)$")


def code(text: str) -> Iterator[str]:
    """Lines of code: fenced, indented by four or in backticks."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M):
        yield from block.splitlines()
    without = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    yield from re.findall(r"^ {4,}(\S.*)$", without, flags=re.M)
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^ {4,}.*$", "", without, flags=re.M))


def words(line: str) -> list[str] | None:
    """The command and its arguments, or None where the line is no command of ours."""
    match = _COMMAND.match(line.rpartition(" | ")[2].strip())
    if match is None:
        return None
    rest = re.split(r" [#<>&]|;| \.\.\.", match[2])[0]
    name = OWN_NAMES.get(match[1])
    return [*([name] if name else []), *shlex.split(rest)]


@functools.cache
def usage(*words: str) -> str:
    """What --help says after these words; fails where they are refused."""
    printed: list[str] = []
    main = importlib.import_module(COMMANDS[words[0]][0]).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "argparse.ArgumentParser._print_message", lambda self, text, file=None: printed.append(text)
        )
        with pytest.raises(SystemExit) as ended:
            main([*words[1:], "--help"])
    assert ended.value.code == 0, f"macrame {' '.join(words)}: {''.join(printed)}"
    return "".join(printed)


def shown(document: Path) -> list[list[str]]:
    found = [words(line) for line in code(document.read_text(encoding="utf-8"))]
    return [line for line in found if line]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of_a_document_can_be_typed(document: Path) -> None:
    for line in shown(document):
        if line[0].startswith("-") or not re.fullmatch(r"[a-z]+", line[0]):
            continue  # macrame --version, macrame COMMAND
        assert line[0] in COMMANDS, f"{document.name}: there is no macrame {line[0]}"
        own = line[: line.index("--")] if "--" in line else line
        first = next((i for i, word in enumerate(own) if word.startswith("-")), len(own))
        actions = [word for word in own[1:first] if re.fullmatch(r"[a-z]+", word)][:1]
        actions += ["--from-running"] if "--from-running" in own else []  # a command of its own
        help_text = usage(line[0], *actions)
        for word in own[first:]:
            if word.startswith("--"):
                flag = word.partition("=")[0]
                assert re.search(rf"{flag}\b", help_text), f"{document.name}: {' '.join(line)}: no {flag}"


def test_the_documents_show_commands() -> None:
    """The reading above finds what is there."""
    assert ["status"] in shown(ROOT / "README.md")
    assert ["plan", "--config", "cluster.json"] in shown(ROOT / "README.md")
    assert sum(len(shown(document)) for document in DOCUMENTS) > 60


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_cluster_files_of_a_document_can_be_read(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for block in re.findall(r"^```json\n(.*?)^```", text, flags=re.S | re.M):
        content = json.loads(block if block.startswith("{") else f"{{{block}}}")
        if "nodes" in content:
            read_config(Table(document, "", content, TOP_KEYS), content.get("model", "m"))

"""Writes what the zoo found: the table in docs/architectures.md, and the proofs shipped with the release.

    python -m tests.zoo.table [--verdicts FILE]

Runs the zoo first, some minutes, unless FILE holds its lines; then proves each cut of the published configs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.zoo.run import EXACT, ONE_NODE, PARTLY, REFUSED, Verdict

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "architectures.md"
DEMO = ROOT / "deploy" / "demo" / "model" / "config.json"
BEGIN, END = "<!-- table: python -m tests.zoo.table -->", "<!-- end of table -->"


def rows(verdicts: Sequence[Verdict]) -> list[str]:
    """The table's lines; raises KeyError for a verdict that no page may show."""
    says = {
        EXACT: lambda verdict: "exact at every cut",
        PARTLY: lambda verdict: f"exact before layers {', '.join(map(str, verdict.legal))}",
        ONE_NODE: lambda verdict: "one node only",
        REFUSED: lambda verdict: "refused",
    }
    lines = ["| architecture | layers tried | verdict | reason |", "|---|---|---|---|"]
    for verdict in verdicts:
        layers = str(verdict.num_layers or "")
        lines.append(f"| {verdict.name} | {layers} | {says[verdict.status](verdict)} | {verdict.reason} |")
    return lines


def summary(verdicts: Sequence[Verdict], version: str) -> str:
    """How many of each."""
    count = Counter(verdict.status for verdict in verdicts)
    return (
        f"mlx-lm {version}: {len(verdicts)} model modules, {count[EXACT]} exact at every cut, "
        f"{count[PARTLY]} at some cuts, {count[ONE_NODE]} for one node only, {count[REFUSED]} refused."
    )


def between(page: str) -> str:
    """What stands between the table's marks."""
    return page.split(BEGIN)[1].split(END, maxsplit=1)[0].strip()


def replaced(page: str, table: str) -> str:
    """The page with another table."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def proofs_of_verdict(verdict: Verdict) -> list[Any]:
    """A proof for each cut that the zoo tried."""
    from shard_loader.cut_proof import CutProof

    return [
        CutProof(cut, True, 0.0, "") if cut in verdict.legal else CutProof(cut, False, None, verdict.reason)
        for cut in range(1, verdict.num_layers)
    ]


def shipped(verdicts: Sequence[Verdict]) -> Iterator[tuple[Mapping[str, Any], Sequence[Any], Any]]:
    """Every config with a proof of every cut, and of what may be done with rows.

    Those of the zoo, the published ones of the tests, the demo's.
    """
    from shard_loader.batch_proof import prove_rows
    from shard_loader.cuts import prove_cuts
    from shard_loader.rehearsal import Rehearsal
    from tests.big_shapes import PUBLISHED
    from tests.real_configs import REAL_CONFIGS
    from tests.zoo.configs import zoo_config

    for verdict in verdicts:
        if verdict.status != REFUSED:
            config = zoo_config(verdict.name)
            yield config, proofs_of_verdict(verdict), prove_rows(Rehearsal(config))
    large = ((str(config["model_type"]), config) for config in PUBLISHED)
    for name, config in [*REAL_CONFIGS.items(), *large, ("demo", json.loads(DEMO.read_text()))]:
        print(f"proving {name}", file=sys.stderr)
        yield config, prove_cuts(config), prove_rows(Rehearsal(config))


def main(argv: Sequence[str] | None = None) -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.table")
    parser.add_argument("--verdicts", type=Path, help="lines of python -m tests.zoo.run")
    args = parser.parse_args(argv)
    os.environ["MLX_DISABLE_COMPILE"] = "1"  # read when MLX is imported
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    from shard_loader.proof_store import SHIPPED, as_shipped, mlx_lm_version
    from tests.zoo.configs import module_names
    from tests.zoo.run import judge_all

    if args.verdicts is None:
        verdicts = list(judge_all(module_names()))
    else:
        lines = args.verdicts.read_text().splitlines()
        verdicts = [Verdict(**json.loads(line)) for line in lines if line.startswith("{")]
    table = "\n".join([summary(verdicts, mlx_lm_version()), "", *rows(verdicts)])
    PAGE.write_text(replaced(PAGE.read_text(), table))
    content = as_shipped((dict(config), *rest) for config, *rest in shipped(verdicts))
    SHIPPED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

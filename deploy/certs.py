"""`macrame certs make|show|renew|renew-ca`: the certificates of a cluster's nodes, made on one machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cluster.arguments import Parser
from cluster.certificate import RENEW, common_name, day, fingerprint, parse_certificates
from cluster.config import load_config
from cluster.errors import EXIT_ERROR, EXIT_OK, EXIT_USAGE, UserError
from cluster.probe import is_this_machine
from deploy.authority import NODE_LIFE, authorities_folder, key_file
from deploy.certificates import CertificateFolder, Standing, folder_of, make
from deploy.command import run_command
from planner.render import table

MAX_DAYS = 3650
_AFTER_ANOTHER_CA = (
    "",
    "Connections that stand are not closed by this: once the files are copied, start every node again. Then",
    "what the old CA signed is refused everywhere.",
)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 where `show` found one that is missing or out of its time, 3 for what is refused."""
    args = _parse(argv)
    return run_command("macrame certs", lambda: _run(args), is_verbose=args.verbose)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="macrame certs",
        description="The certificates by which nodes know each other, made on one machine for all.\n\n"
        "  make    what is missing or ends within 60 days, and the CA the first time\n"
        "  show    how they stand\n"
        "  renew   new keys and certificates for the nodes named, or for all\n"
        "  renew-ca  the same for all from a new CA: what the old one signed is refused",
        examples=(
            ("macrame certs make --config cluster.json", "for all nodes; says which file to copy where"),
            ("macrame certs renew mini2 --config cluster.json", "a new key for one node"),
            ("macrame certs renew-ca --config cluster.json", "after a machine or a key was lost"),
        ),
    )
    parser.add_argument("action", choices=("make", "show", "renew", "renew-ca"), help="what to do, as above")
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="renew only these, by name")
    parser.add_argument("--config", type=Path, required=True, help="the cluster's JSON or YAML file")
    parser.add_argument(
        "--days",
        type=int,
        default=NODE_LIFE.days,
        metavar="N",
        help=f"days that new ones are good for (default {NODE_LIFE.days})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if not 1 <= args.days <= MAX_DAYS:
        parser.error(f"--days {args.days} must be from 1 to {MAX_DAYS}")
    if args.nodes and args.action != "renew":
        parser.error(f"{args.action} is for all nodes; renew takes names")
    return args


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, model="any")  # a hostfile names none, and certificates need none
    folder, now = folder_of(config), datetime.now(UTC)
    if args.action == "show":
        return _show(folder, now, is_json=args.json)
    names = [node.name for node in config.nodes]
    for name in args.nodes:
        if name not in names:
            raise UserError(
                f"{args.config} has no node {name!r}: its nodes are {', '.join(names)}", EXIT_USAGE
            )
    again = (args.nodes or names) if args.action == "renew" else ()
    is_new_ca = args.action == "renew-ca"
    was_there = folder.ca_file.exists() and not is_new_ca
    life = timedelta(days=args.days)
    standings = make(folder, authorities_folder(), now, again=again, life=life, is_new_ca=is_new_ca)
    if args.json:
        print(json.dumps(_as_json(folder, standings, now), indent=2))
    else:
        lines = _told(folder, standings, now, is_new=not was_there)
        print("\n".join([*lines, *(_AFTER_ANOTHER_CA if is_new_ca else ())]))
    return EXIT_OK


def _show(folder: CertificateFolder, now: datetime, *, is_json: bool) -> int:
    standings = folder.standings(now)
    if is_json:
        print(json.dumps(_as_json(folder, standings, now), indent=2))
    else:
        print("\n".join([*_about_ca(folder), *_rows(standings, now)]))
        if any(s.need for s in standings):
            print(f"\n{RENEW[0].upper()}{RENEW[1:]}.")
    is_bad = any(s.expires_at is None or s.expires_at <= now for s in standings)
    return EXIT_ERROR if is_bad else EXIT_OK


def _rows(standings: list[Standing], now: datetime) -> list[str]:
    return table(
        [
            {
                "rank": str(s.node.rank),
                "node": s.node.name,
                "certificate": str(s.files.cert),
                "good until": day(s.expires_at) if s.expires_at is not None else "",
                "days": str((s.expires_at - now).days) if s.expires_at is not None else "",
                "": s.need,
            }
            for s in standings
        ]
    )


def _as_json(folder: CertificateFolder, standings: list[Standing], now: datetime) -> dict[str, Any]:
    ca = _ca(folder)
    return {
        "ca": None if ca is None else {"file": str(folder.ca_file), **ca},
        "nodes": [
            {
                "rank": s.node.rank,
                "name": s.node.name,
                "cert": str(s.files.cert),
                "key": str(s.files.key),
                "expires_at": None if s.expires_at is None else s.expires_at.isoformat(),
                "days_left": None if s.expires_at is None else (s.expires_at - now).days,
                "need": s.need,
            }
            for s in standings
        ],
    }


def _ca(folder: CertificateFolder) -> dict[str, str] | None:
    if not folder.ca_file.exists():
        return None
    cert = parse_certificates(folder.ca_file, folder.ca_file.read_bytes())[0]
    return {
        "name": common_name(cert),
        "fingerprint": fingerprint(cert),
        "expires_at": cert.not_valid_after_utc.isoformat(),
        "key": str(key_file(authorities_folder(), cert)),
    }


def _about_ca(folder: CertificateFolder) -> list[str]:
    """Who signs, until when, and whether this machine can."""
    ca = _ca(folder)
    if ca is None:
        return []
    where = f"is in {ca['key']}" if Path(ca["key"]).exists() else "is not on this machine"
    return [f"{ca['name']}, good until {ca['expires_at'][:10]}. Its key {where}.", ""]


def _told(folder: CertificateFolder, standings: list[Standing], now: datetime, *, is_new: bool) -> list[str]:
    ca = _ca(folder)
    assert ca is not None
    made = [s for s in standings if s.need]
    lines = []
    if is_new:
        lines.append(f"Made {ca['name']}. Its key stays here, copy it nowhere but to a backup: {ca['key']}")
    lines += [f"Made the certificate of {s.node.name}: {s.need}." for s in made]
    lines += [*(lines and [""]), *_rows([_settled(s) for s in standings], now)]
    if made:
        lines += ["", *_copying(made)]
    else:
        lines += ["", "All of them are right; nothing was changed."]
    if not folder.config.security.has_tls:
        given = {
            "ca": folder.security.tls_ca,
            "cert": folder.security.tls_cert,
            "key": folder.security.tls_key,
        }
        lines += ["", f'Then put this into "security" in {folder.config.path}, everywhere:']
        lines.append(f'    "tls": {json.dumps(given)}')
    return lines


def _settled(standing: Standing) -> Standing:
    return Standing(standing.node, standing.files, "", standing.expires_at)


def _copying(made: list[Standing]) -> list[str]:
    """Lines that say which file belongs where."""
    away = [s for s in made if not is_this_machine(s.node.host)]
    if not away:
        return ["A running node takes the new files by itself."]
    lines = ["Copy to each other machine its own three files, to where its cluster file looks for them:"]
    for s in away:
        files = [s.files.ca, s.files.cert, s.files.key]
        lines.append(
            f"    scp -p {' '.join(map(str, files))} {s.node.host}:{_from_home(s.files.cert.parent)}/"
        )
    return [*lines, "A running node takes them by itself, for the connections that begin afterwards."]


def _from_home(folder: Path) -> Path:
    """The folder as scp understands it there, if the other machine has it in the same place."""
    with contextlib.suppress(ValueError):
        return folder.relative_to(Path.home())
    return folder


if __name__ == "__main__":
    sys.exit(main())

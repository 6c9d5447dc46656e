"""This machine as `macrame doctor` looks at it: its part of a config, and its credentials. One thread."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.diagnosis import Finding, Subject
from cluster.diagnosis_checks import diagnose
from cluster.probe import is_this_machine
from cluster.tls import Credentials, own_credentials


@dataclass(frozen=True, slots=True)
class Machine:
    """Without a config only the machine itself is looked at; `why_no_config` says why there is none."""

    config: ClusterConfig | None = None
    why_no_config: str = "needs --config"

    @staticmethod
    def of(path: Path, model: str | None) -> Machine:
        """Raises ConfigError."""
        return Machine(load_config(path, model=model))

    @property
    def subject(self) -> Subject:
        """What is looked at. A config of addresses that are none of this machine's has no nodes here."""
        config = self.config
        if config is None:
            return Subject(why_no_config=self.why_no_config)
        ranks = tuple(node.rank for node in config.nodes if node.use and is_this_machine(node.host))
        try:
            credentials = own_credentials(config)
        except ConfigError:  # `security` says why
            credentials = None
        return Subject(config, ranks, credentials=credentials)

    def diagnose(self, on_check: Callable[[str], object], *, without: Collection[str] = ()) -> list[Finding]:
        """All checks but those in `without`."""
        return diagnose(self.subject, on_check, without=without)

    def ring_credentials(self) -> Credentials | None:
        """What the nodes are asked with; None: there is none that can be used."""
        return self.subject.credentials

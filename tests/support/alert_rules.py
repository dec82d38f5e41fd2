"""The alert rules in grafana/alerts.yml, read for the tests."""

from pathlib import Path
from typing import Any

import yaml  # PyYAML: moto[s3,server], which the test extra asks for, requires it

GRAFANA = Path(__file__).parents[2] / "grafana"


def read(name: str) -> Any:
    """What the YAML file ``name`` in grafana/ says."""
    return yaml.safe_load((GRAFANA / name).read_text())


def alerts() -> list[dict[str, Any]]:
    """All rules, as they stand there; two may have the same name and another severity."""
    return [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]


def alert_expressions() -> list[tuple[str, str]]:
    """The name and the PromQL expression of each rule."""
    return [(rule["alert"], rule["expr"]) for rule in alerts()]

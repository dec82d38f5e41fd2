"""The Grafana dashboard for tests: its panels, and every expression in it as Prometheus would get it."""

import json
import re
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "grafana" / "dashboard.py"
FILE = SCRIPT.with_name("zodb-s3blobs.json")
DASHBOARD = json.loads(FILE.read_text())

#: The panels without the rows.
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = DASHBOARD["templating"]["list"]
ANNOTATIONS = DASHBOARD["annotations"]["list"]

_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^{}]*)\}(\[[^\]]*\])?")
_MATCHER = re.compile(r'\s*([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*(?:,|$)')
_VARIABLE = re.compile(r"label_values\((.*), (\w+)\)")


def raw_expressions():
    """(where, expression) of each panel and annotation, as they stand in the file."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"{panel['title']} ({panel['id']}{target['refId']})", target["expr"]
    for annotation in ANNOTATIONS:
        yield f"annotation {annotation['name']}", annotation["expr"]


def query_variables():
    """(name, series, label) of each variable whose values Prometheus is asked for."""
    for variable in VARIABLES:
        if variable["type"] == "query":
            selector, label = _VARIABLE.fullmatch(variable["query"]["query"]).groups()
            yield variable["name"], selector, label


def selectors(expression):
    """(metric, {label: (operator, value)}, range, what stands before it) of each selector of an expression."""
    for found in _SELECTOR.finditer(expression):
        metric, inside, window = found.groups()
        matchers = {label: (operator, value) for label, operator, value in _MATCHER.findall(inside)}
        yield metric, matchers, window, expression[: found.start()]


def substituted(expression, rate_interval="1m", dashboard_range="1h"):
    """``expression`` as Grafana sends it when everything is chosen."""
    values = {
        "job": ".+",
        "instance": ".+",
        "storage": ".+",
        "__rate_interval": rate_interval,
        "__range": dashboard_range,
    }
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], expression)


def dashboard_expressions(rate_interval="1m"):
    """(where, expression) of all that the dashboard asks Prometheus: panels, annotations, variables."""
    asked = [*raw_expressions(), *((f"variable {name}", selector) for name, selector, _ in query_variables())]
    return [(where, substituted(expression, rate_interval)) for where, expression in asked]

"""grafana/picture.py: the page that the picture of the dashboard is made of. Prometheus's answers are canned."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.support.dashboard_queries import ANNOTATIONS, DASHBOARD, PANELS, VARIABLES

SCRIPT = Path(__file__).parents[2] / "grafana" / "picture.py"
START, END = 1_700_000_000, 1_700_000_600


@pytest.fixture(scope="module")
def picture():
    spec = importlib.util.spec_from_file_location("picture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def draw(picture):
    """Draws panels as if every query had this one answer; gives the page and the errors."""

    def make(panels, value, **labels):
        class Canned(picture.Source):
            def ask(self, query, start):
                if query == "refused":
                    raise picture.Trouble("Prometheus refuses it")
                moments = (START, START + self.step, END)
                return [{"metric": labels, "values": [[moment, value] for moment in moments if moment >= start]}]

        templating = {"list": VARIABLES}
        dashboard = {"title": "Title", "annotations": {"list": ANNOTATIONS}, "templating": templating, "panels": panels}
        html, _, wrong = picture.page(dashboard, Canned("http://prometheus.example", START, END, scrape_interval=15))
        return html, wrong

    return make


def figure(title, unit, mappings=(), kind="stat", expr="up"):
    steps = [{"color": "green", "value": None}, {"color": "red", "value": 100}]
    defaults = {"unit": unit, "mappings": list(mappings), "thresholds": {"steps": steps}, "custom": {}, "noValue": "?"}
    options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "none"}
    return [
        {"type": "row", "title": "Row", "gridPos": {"x": 0, "y": 0, "w": 24, "h": 1}},
        {
            "type": kind,
            "title": title,
            "gridPos": {"x": 0, "y": 1, "w": 4, "h": 4},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": options,
            "targets": [{"refId": "A", "expr": expr, "legendFormat": "", "instant": True}],
        },
    ]


def test_the_whole_dashboard_can_be_drawn(draw, picture):
    html, wrong = draw(DASHBOARD["panels"], "0.25", instance="zeo1:8101", storage="main", operation="put", le="0.5")
    assert wrong == []
    for panel in DASHBOARD["panels"]:
        assert picture.escape(panel["title"]) in html
    assert html.count("<article") == len(PANELS)
    assert "zeo1:8101 main" in html


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        ("0.9376", "percentunit", "93.8%"),
        ("0", "percentunit", "0%"),
        ("1536", "bytes", "1.5 KiB"),
        ("2500000", "Bps", "2.5 MB/s"),
        ("0.0042", "s", "4.2 ms"),
        ("0", "s", "0 s"),
        ("90", "s", "1.5 min"),
        ("12.25", "ops", "12.2 ops/s"),
        ("48211", "short", "48.2 K"),
        ("NaN", "s", "?"),
    ],
)
def test_a_value_is_shown_in_its_unit(draw, value, unit, text):
    html, wrong = draw(figure("One figure", unit), value)
    assert wrong == []
    assert f">{text}</" in html


def test_thresholds_give_a_value_its_colour(draw, picture):
    assert f"color: {picture.COLOURS['green']}" in draw(figure("One figure", "none"), "99")[0]
    assert f"color: {picture.COLOURS['red']}" in draw(figure("One figure", "none"), "100")[0]


def test_a_mapped_value_is_shown_as_its_text(draw, picture):
    down = {"type": "value", "options": {"0": {"text": "DOWN", "color": "red"}}}
    html, _ = draw(figure("One figure", "none", [down]), "0")
    assert f"color: {picture.COLOURS['red']}" in html and ">DOWN</" in html


@pytest.mark.parametrize("what", [{"unit": "furlongs"}, {"kind": "piechart"}, {"expr": "refused"}])
def test_what_cannot_be_drawn_is_named(draw, what):
    _, [sentence] = draw(figure("One figure", **{"unit": "none"} | what), "1")
    assert sentence.startswith("Panel One figure: ")


def test_a_table_has_its_columns_in_the_order_that_the_dashboard_gives(draw):
    (table,) = (panel for panel in DASHBOARD["panels"] if panel["title"] == "What runs where")
    labels = {"bucket": "site-blobs", "instance": "zeo1:8101", "job": "zeo", "storage": "main", "version": "1.2"}
    html, _ = draw([table], "90", **labels)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html)
    assert cells[:5] == ["Server", "Storage", "Version", "Bucket", "Running for"]
    assert cells[5:] == ["zeo1:8101", "main", "1.2", "site-blobs", "1.5 min"]

"""The Grafana dashboard: as the script writes it, ready to import, and every query asks for what was chosen."""

import itertools
import json
import re
import shutil
import subprocess
import sys

from tests.support import promtool
from tests.support.dashboard_queries import (
    ANNOTATIONS,
    DASHBOARD,
    FILE,
    PANELS,
    SCRIPT,
    VARIABLES,
    dashboard_expressions,
    query_variables,
    raw_expressions,
    selectors,
    substituted,
)

PROMETHEUS = {"type": "prometheus", "uid": "${datasource}"}
ROWS = [
    "Overview",
    "Clients and event loop",
    "Commits and uploads",
    "Reads and cache",
    "S3",
    "Garbage collection",
    "Process",
]
#: What a server exports once, not for each storage, and with it for what Prometheus knows of the server itself.
WITHOUT_STORAGE = re.compile(r"up|process_\w+|python_\w+|zeo_event_loop_\w+|s3blobs_build_info")
COUNTER = re.compile(r"\w+_(total|count|sum|bucket)")
EXPRESSIONS = list(raw_expressions())
#: The metrics that no panel shows, and what tells an operator as much.
NOT_SHOWN = {
    "s3blobs_cache_evictions_total": "their bytes, in Cache traffic",
    "s3blobs_bucket_owner_changed_timestamp_seconds": "the alert S3BlobsOwnerChanged, which stays for a week",
}


# The file


def test_the_file_is_what_the_script_writes(tmp_path):
    script = shutil.copy(SCRIPT, tmp_path)
    subprocess.run([sys.executable, script], check=True, timeout=60)
    assert (tmp_path / FILE.name).read_bytes() == FILE.read_bytes(), "run: python grafana/dashboard.py"


def test_grafana_takes_it_by_import_and_by_provisioning_alike():
    assert DASHBOARD["schemaVersion"] == 39
    assert DASHBOARD["uid"] == "zodb-s3blobs"
    assert DASHBOARD["editable"] is False
    assert DASHBOARD["graphTooltip"] == 1
    assert "__inputs" not in DASHBOARD and "id" not in DASHBOARD


# Variables


def test_the_data_source_is_a_variable_that_all_use():
    assert (VARIABLES[0]["name"], VARIABLES[0]["type"], VARIABLES[0]["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    users = [*VARIABLES[1:], *ANNOTATIONS, *PANELS, *(target for panel in PANELS for target in panel["targets"])]
    assert [user for user in users if user["datasource"] != PROMETHEUS] == []


def test_each_variable_offers_what_the_ones_before_it_leave():
    names = ["job", "instance", "storage"]
    assert [(name, label) for name, _, label in query_variables()] == [(name, name) for name in names]
    for number, (_, selector, _) in enumerate(query_variables()):
        assert selector.startswith("s3blobs_storage_info")
        assert re.findall(r'(\w+)=~"\$(\w+)"', selector) == [(name, name) for name in names[:number]]


def test_several_values_or_all_can_be_chosen_and_new_ones_are_found():
    for variable in VARIABLES[1:]:
        assert variable["multi"] and variable["includeAll"]
        assert variable["allValue"] == ".+"
        assert variable["refresh"] == 2
        assert variable["current"]["value"] == ["$__all"]


# Panels


def test_rows_come_in_the_order_in_which_trouble_is_looked_for():
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in rows] == ROWS


def test_ids_are_unique():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_panels_fit_the_grid_and_none_hides_another():
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for place in places:
        assert place["x"] >= 0 and place["w"] > 0 and place["h"] > 0 and place["x"] + place["w"] <= 24
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_the_overview_fits_the_first_screen():
    rows = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows[0] == 0 and rows[1] <= 24


def test_a_panel_says_what_it_shows_and_what_to_do():
    for panel in PANELS:
        assert panel["type"] in {"stat", "timeseries", "table"}
        assert panel["title"]
        assert len(re.findall(r"\.(?:\s|$)", panel["description"])) >= 2, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_the_axis_beside_a_line_of_zeros_does_not_go_to_100():
    """Which Grafana would choose by itself, and which would be 10000% or 1.67 minutes."""
    for panel in PANELS:
        if panel["type"] == "timeseries":
            defaults = panel["fieldConfig"]["defaults"]
            assert ("max" in defaults) != ("axisSoftMax" in defaults["custom"]), panel["title"]


def test_what_has_another_unit_than_its_panel_has_an_axis_of_its_own():
    for panel in PANELS:
        if panel["type"] == "timeseries":
            for override in panel["fieldConfig"]["overrides"]:
                special = {each["id"]: each["value"] for each in override["properties"]}
                if "unit" in special:
                    assert special["unit"] != panel["fieldConfig"]["defaults"]["unit"], panel["title"]
                    assert special["custom.axisPlacement"] == "right", panel["title"]
                    assert special["custom.axisSoftMax"] > 0, panel["title"]


def test_a_legend_tells_two_storages_apart_in_its_three_lines():
    for panel in PANELS:
        for_each = [target for target in panel["targets"] if "{{storage}}" in target["legendFormat"]]
        assert len(for_each) <= 2 or panel["gridPos"]["w"] >= 12, panel["title"]


def test_tables_fit_a_window_of_1280_pixels():
    for panel in PANELS:
        if panel["type"] == "table":
            labels = panel["transformations"][1]["options"]["renameByName"]
            kept = re.search(r"by \(([^)]*)\)", panel["targets"][0]["expr"])
            shown = kept[1].split(", ") if kept else labels
            widths = {
                override["matcher"]["options"]: each["value"]
                for override in panel["fieldConfig"]["overrides"]
                for each in override["properties"]
                if each["id"] == "custom.width"
            }
            narrow = panel["fieldConfig"]["defaults"]["custom"]["minWidth"]
            columns = [labels[label] for label in shown] + [f"Value #{target['refId']}" for target in panel["targets"]]
            needed = sum(widths.get(name, narrow) for name in columns)
            assert needed < 1280 - 50, panel["title"]


def test_runbook_and_alerts_send_nobody_to_a_panel_or_row_that_is_not_there():
    titles = {panel["title"] for panel in DASHBOARD["panels"]}
    for text in (FILE.with_name("README.md"), FILE.with_name("alerts.yml")):
        words = " ".join(text.read_text().split())
        named = re.findall(r'(?:[Pp]anels?|[Rr]ow) ("[^"]+"(?:(?:,| and) "[^"]+")*)', words)
        assert named
        assert {title for some in named for title in re.findall(r'"([^"]+)"', some)} <= titles, text.name


def test_thresholds_start_anywhere_and_rise():
    for panel in PANELS:
        settings = panel["fieldConfig"]
        shown = [settings["defaults"]["thresholds"]]
        properties = itertools.chain.from_iterable(override["properties"] for override in settings["overrides"])
        shown += [each["value"] for each in properties if each["id"] == "thresholds"]
        for thresholds in shown:
            first, *others = [step["value"] for step in thresholds["steps"]]
            assert first is None, panel["title"]
            assert others == sorted(others), panel["title"]


def test_overrides_name_a_query_of_their_panel_or_a_column():
    for panel in PANELS:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs), panel["title"]
        if panel["type"] == "table":  # so Grafana names the columns of their values
            refs = ["Value"] if len(refs) == 1 else [f"Value #{ref}" for ref in refs]
            _, organize = panel["transformations"]
            refs += organize["options"]["renameByName"].values()
        for override in panel["fieldConfig"]["overrides"]:
            assert override["matcher"]["options"] in refs, panel["title"]


def test_a_legend_names_labels_that_its_query_keeps():
    for panel in PANELS:
        for target in panel["targets"]:
            kept = re.search(r"by \(([^)]*)\)", target["expr"])
            kept = set(kept[1].split(", ")) if kept else {"instance"}
            if panel["type"] != "table":  # which makes columns of the labels
                assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]


# Queries


def test_a_query_asks_only_for_what_is_chosen():
    for where, expression in EXPRESSIONS:
        found = list(selectors(expression))
        assert found, where
        for metric, matchers, _, _ in found:
            chosen = ["job", "instance"] if WITHOUT_STORAGE.fullmatch(metric) else ["job", "instance", "storage"]
            asked = {label: matcher for label, matcher in matchers.items() if matcher[1].startswith("$")}
            assert asked == {label: ("=~", f"${label}") for label in chosen}, (where, metric)


def test_every_metric_is_shown():
    reference = FILE.with_name("README.md").read_text()
    metrics = set(re.findall(r"^\| `((?:s3blobs|zeo)_\w+)` \|", reference, re.MULTILINE))
    asked = {metric for _, text in EXPRESSIONS for metric, *_ in selectors(text)}
    asked |= {re.sub(r"_(bucket|count|sum)$", "", metric) for metric in asked}
    assert metrics - asked == NOT_SHOWN.keys()


def test_no_metric_stands_without_a_selector():
    for where, expression in EXPRESSIONS:
        assert re.findall(r"\b((?:s3blobs|zeo|process|python)_\w+|up)\b(?!\{)", expression) == [], where


def test_counters_are_asked_for_their_growth_and_nothing_else_is():
    for where, expression in EXPRESSIONS:
        for metric, _, window, before in selectors(expression):
            growth = before.endswith(("rate(", "increase("))
            assert growth == bool(COUNTER.fullmatch(metric)), (where, metric)
            if growth:
                assert window == "[$__rate_interval]", (where, metric)


def test_what_every_process_exports_is_shown_of_our_servers_only():
    """All jobs are all that Prometheus scrapes."""
    for where, expression in EXPRESSIONS:
        if any(re.fullmatch(r"up|process_\w+|python_\w+", metric) for metric, *_ in selectors(expression)):
            assert "on (job, instance)" in expression and "s3blobs_storage_info{" in expression, where


def test_an_idle_server_divides_nothing_by_zero():
    for where, expression in EXPRESSIONS:
        for divisor in re.findall(r"/ (?:on \([^)]*\) group_left \(\) )?(\w+)", expression):
            assert divisor in {"clamp_min", "process_max_fds"}, where


def test_a_share_is_never_more_than_all():
    """What two counters count together, two scrapes may see apart."""
    shares = [(where, text) for where, text in EXPRESSIONS if re.search(r"\) / ", text)]
    assert len(shares) > 5
    assert [where for where, text in shares if "clamp_max(" not in text] == []


def test_starts_and_garbage_collections_are_marked():
    marked = {metric for annotation in ANNOTATIONS for metric, *_ in selectors(annotation["expr"])}
    assert {"process_start_time_seconds", "s3blobs_gc_last_success_timestamp_seconds"} <= marked
    assert all(annotation["enable"] and annotation["useValueForTime"] for annotation in ANNOTATIONS)


def test_nothing_of_grafana_is_left_in_what_prometheus_is_asked():
    asked = dashboard_expressions("90s")
    assert len(asked) == len(EXPRESSIONS) + 3
    assert [text for _, text in asked if "$" in text] == []
    assert any("[90s]" in text for _, text in asked)
    assert substituted('up{job=~"$job"}[$__range]') == 'up{job=~".+"}[1h]'


def test_prometheus_can_parse_every_query(tmp_path):
    rules = [{"record": f"query:{n}", "expr": text} for n, (_, text) in enumerate(dashboard_expressions())]
    file = tmp_path / "rules.json"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool.run("check", "rules", file, directory=tmp_path)

"""The alerts of ``status`` are those of grafana/alerts.yml: the unit tests of these hold for both."""

import re

import pytest

from tests.support.alert_rules import GRAFANA, alerts, read
from zodb_s3blobs.commands.status.looks import History, Look
from zodb_s3blobs.commands.status.rules import RULES, find

#: `status` finds out by itself whether the server answers, and waits for nothing then.
OF_PROMETHEUS = {"S3BlobsDown"}

GROUPS = [group for path in sorted(GRAFANA.glob("alerts*_test.yml")) for group in read(path.name)["tests"]]
CASES = [
    pytest.param(group, case, id=f"{group['name']} at {case['eval_time']}")
    for group in GROUPS
    for case in group.get("alert_rule_test", ())
    if case["alertname"] not in OF_PROMETHEUS
]


def seconds(text):
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)(\w)", text))


def expanded(values):
    """The values of a series as promtool writes them; None where there is none."""
    for token in values.split():
        if missing := re.fullmatch(r"_(?:x(\d+))?", token):
            yield from [None] * int(missing[1] or 1)
            continue
        begin, step, times = re.fullmatch(r"(-?[\d.]+)([+-][\d.]+)?(?:x(\d+))?", token).groups()
        for number in range(int(times or 0) + 1):
            yield float(begin) + number * float(step or 0)


def looks(group, instance):
    """The looks at ``instance`` at each interval of a unit test."""
    series = []
    for one in group["input_series"]:
        name, labels = re.fullmatch(r"(\w+)\{(.*)\}", one["series"]).groups()
        labels = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if labels.pop("instance") == instance:
            del labels["job"]
            series.append((name, frozenset(labels.items()), list(expanded(one["values"]))))
    interval = seconds(group["interval"])
    for number in range(max((len(values) for _, _, values in series), default=0)):
        found = {}
        for name, labels, values in series:
            if number < len(values) and values[number] is not None:
                found.setdefault(name, {})[labels] = values[number]
        yield Look(number * interval, found)


def found_at(group, instance, moment):
    history = History("", "")
    for look in looks(group, instance):
        if look.time <= moment:
            history.add(look)
    return find(history.looks, has_history=True) if history.looks else []


def worst(found):
    """The severities by storage and operation, without a warning where the same alert is critical."""
    return {key for key in found if not (key[0] == "WARNING" and ("CRITICAL", *key[1:]) in found)}


def test_the_names_severities_and_times_are_those_of_the_rules():
    rules = [
        (rule["alert"], rule["labels"]["severity"].upper(), seconds(rule.get("for", "")))
        for rule in alerts()
        if rule["alert"] not in OF_PROMETHEUS
    ]
    assert [(rule.name, rule.severity, rule.lasts) for rule in RULES] == rules


@pytest.mark.parametrize(("group", "case"), CASES)
def test_what_prometheus_finds_status_finds_too(group, case):
    names = " ".join(one["series"] for one in group["input_series"])
    for instance in set(re.findall('instance="(.*?)"', names)):
        expected = [one["exp_labels"] for one in case["exp_alerts"] if one["exp_labels"]["instance"] == instance]
        found = found_at(group, instance, seconds(case["eval_time"]))
        ours = [one for one in found if one.name == case["alertname"] and not one.is_pending]
        assert worst({(one.severity, one.storage) for one in ours}) == worst(
            {(one["severity"].upper(), one.get("storage", "")) for one in expected}
        )
        assert {one.label for one in ours if one.label} <= {value for one in expected for value in one.values()}


def test_an_idle_server_has_no_alert_pending():
    (group,) = (group for group in GROUPS if group["name"] == "idle")
    end = max(look.time for look in looks(group, "zeo1"))
    for moment in range(0, int(end) + 1, 600):
        assert found_at(group, "zeo1", moment) == []


@pytest.mark.parametrize("started", [{frozenset(): 1000.0}, {}], ids=["known", "unknown"])
def test_without_a_state_file_a_lag_of_months_is_no_lag_of_now(started):
    """macOS does not tell when a process was started."""
    series = {"process_start_time_seconds": started, "zeo_event_loop_lag_seconds_sum": {frozenset(): 5000.0}}
    look = Look(1e7, series)
    assert find([look.at_start(), look], has_history=False) == []


def test_the_looks_of_a_state_file_are_few():
    history = History("", "")
    for minute in range(0, 12 * 24 * 60, 5):
        history.add(Look(minute * 60.0, {}))
    assert len(history.looks) < 100
    assert history.looks[-1].time - history.looks[0].time > 10 * 86400

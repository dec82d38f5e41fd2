"""grafana/: the alert rules, their unit tests, their runbook, and the example configuration of Prometheus."""

import re
import shutil
import subprocess

import pytest

from tests.support import promtool
from tests.support.alert_rules import GRAFANA, alert_expressions, alerts, read
from tests.support.speed import slow

#: Those who have set up routing or silences know them by these names.
NAMES = {
    "S3BlobsDown",
    "S3BlobsBucketUnavailable",
    "S3BlobsBlobMissing",
    "S3BlobsChecksumFailure",
    "S3BlobsFallbackFails",
    "S3BlobsVoteFailures",
    "S3BlobsUploadSlow",
    "S3BlobsS3ErrorRate",
    "S3BlobsS3AuthFailures",
    "S3BlobsBucketFull",
    "S3BlobsBlobArchived",
    "S3BlobsS3Throttled",
    "S3BlobsEventLoopBlocked",
    "S3BlobsCommitLockHeld",
    "S3BlobsCommitQueue",
    "S3BlobsS3UnderCommitLock",
    "S3BlobsCacheThrashing",
    "S3BlobsCacheOverLimit",
    "S3BlobsCacheDamaged",
    "S3BlobsCacheDiskFull",
    "S3BlobsCleanupFailures",
    "S3BlobsGCStale",
    "S3BlobsGCFailing",
    "S3BlobsGCDeletionSpike",
    "S3BlobsOwnerConflict",
    "S3BlobsOwnerChanged",
}
RULES = [pytest.param(rule, id=f"{rule['alert']}-{rule['labels']['severity']}") for rule in alerts()]
UNIT_TESTS = sorted(path.name for path in GRAFANA.glob("alerts*_test.yml"))
README = (GRAFANA / "README.md").read_text()


def groups():
    """All groups of the unit tests."""
    return [group for name in UNIT_TESTS for group in read(name)["tests"]]


def cases(alert):
    """What the unit tests expect of ``alert``: a list of alerts for each case."""
    return [
        case["exp_alerts"]
        for group in groups()
        for case in group.get("alert_rule_test", ())
        if case["alertname"] == alert
    ]


def section(alert):
    """The lines of README.md between the heading ``alert`` and the next one."""
    _, *found = re.split(rf"^### {alert}$", README, flags=re.MULTILINE)
    assert len(found) == 1, f"one heading ### {alert}"
    return re.split(r"^#+ ", found[0], flags=re.MULTILINE)[0].strip()


def test_every_alert_is_there():
    assert {name for name, _ in alert_expressions()} == NAMES


def test_the_error_rate_is_first_a_warning_and_then_critical():
    severities = [rule["labels"]["severity"] for rule in alerts() if rule["alert"] == "S3BlobsS3ErrorRate"]
    assert sorted(severities) == ["critical", "warning"]


@slow
def test_promtool_accepts_the_rules():
    promtool.run("check", "rules", "--lint=all", "--lint-fatal", "alerts.yml", directory=GRAFANA)


@slow
@pytest.mark.parametrize("name", UNIT_TESTS)
def test_the_rules_pass_their_unit_tests(name):
    promtool.run("test", "rules", name, directory=GRAFANA)


@slow
def test_promtool_accepts_the_configuration():
    promtool.run("check", "config", "prometheus.yml", directory=GRAFANA)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_says_what_is_wrong_and_how_bad_it_is(rule):
    assert rule["labels"]["severity"] in ("warning", "critical")
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert "$labels.instance" in annotations["summary"]
    assert " First" in annotations["description"], "it should say what to do first"
    if "s3blobs_" in rule["expr"]:
        assert "$labels.storage" in annotations["summary"]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_links_to_its_section_of_the_runbook(rule):
    base, anchor = rule["annotations"]["runbook_url"].split("#")
    assert base == "https://example.com/zodb-s3blobs/grafana/README.md"
    assert anchor == rule["alert"].lower()  # as a heading's anchor is made
    assert section(rule["alert"])


@pytest.mark.parametrize("rule", RULES)
def test_the_table_of_alerts_names_a_rule_and_its_severity(rule):
    row = re.search(rf"^\| \[{rule['alert']}\]\(#{rule['alert'].lower()}\) \|(.*)$", README, re.MULTILINE)
    assert row and rule["labels"]["severity"] in row[1]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent(rule):
    severity = rule["labels"]["severity"]
    fired = [[alert["exp_labels"]["severity"] for alert in expected] for expected in cases(rule["alert"])]
    assert any(severity in severities for severities in fired)
    assert any(not severities for severities in fired)


def test_the_unit_test_of_an_idle_server_knows_all_metrics_of_the_rules():
    """Or a rule would be silent there only because it has nothing to look at."""
    (idle,) = (group for group in groups() if group["name"] == "idle")
    assert all(test["expr"] == "ALERTS" and test["exp_samples"] == [] for test in idle["promql_expr_test"])
    there = {re.match(r"\w+", series["series"])[0] for series in idle["input_series"]}
    needed = {name for _, expr in alert_expressions() for name in re.findall(r"\b(?:s3blobs|zeo)_\w+", expr)}
    assert needed and needed <= there


def test_ranges_allow_for_a_scrape_a_minute():
    minutes = {"m": 1, "h": 60, "d": 1440}
    ranges = [found for _, expr in alert_expressions() for found in re.findall(r"\[(\d+)(.)\]", expr)]
    assert ranges and all(int(number) * minutes[unit] >= 5 for number, unit in ranges)


def test_the_configuration_scrapes_the_job_that_the_rules_know():
    (job,) = read("prometheus.yml")["scrape_configs"]
    assert f'up{{job="{job["job_name"]}"}}' in dict(alert_expressions())["S3BlobsDown"]
    assert job["static_configs"] == [{"targets": ["localhost:8101"]}]


def test_the_command_that_puts_the_address_of_the_runbooks_in_changes_all_of_them(tmp_path):
    (command,) = set(re.findall(r"sed -i 's#https://example.com/\S* alerts\.yml", README))
    assert command in (GRAFANA / "alerts.yml").read_text()
    shutil.copy(GRAFANA / "alerts.yml", tmp_path)
    # sed -i of macOS wants a suffix
    subprocess.run(command.replace("-i", "-i.before"), shell=True, check=True, cwd=tmp_path)
    links = re.findall(r"^ +runbook_url: (\S+)$", (tmp_path / "alerts.yml").read_text(), re.MULTILINE)
    assert len(links) == len(RULES) and all(link.startswith("https://your.example.net/") for link in links)


@pytest.mark.parametrize("path", sorted(GRAFANA.glob("provisioning/*/*.yml")), ids=lambda path: path.name)
def test_the_provisioning_examples_are_for_grafana(path):
    (kind,) = {"datasources": ["datasources"], "dashboards": ["providers"]}[path.parent.name]
    example = read(path.relative_to(GRAFANA))
    assert example["apiVersion"] == 1
    assert all(entry["name"] and entry["type"] in ("prometheus", "file") for entry in example[kind])

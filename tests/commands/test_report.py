"""The report in which migrate, export and verify end, as it is printed."""

import json

import pytest

from zodb_s3blobs.database.survey import Outcome, Report

OID, TID = b"\0" * 7 + b"\1", b"\3\xd0\xc0\xb0\xa0\x90\x80\x70"
MEANINGS = {"good": "a meaning that is as long as any, " * 4, "unreadable": "short", "none": "of which there are none"}


@pytest.fixture
def report():
    report = Report()
    report.add(Outcome(OID, TID, "good", 5))
    report.objects["good"], report.sizes["good"] = 123_456_789, 987_654_321_098_765
    report.add(Outcome(OID, TID, "unreadable", 0, "the reason"))
    return report


def test_the_table_fits_a_terminal_whatever_the_numbers(report, capsys):
    report.show(MEANINGS, "All is well.", as_json=False)
    head, table, verdict = capsys.readouterr().out.split("\n\n")
    assert head.startswith("unreadable: oid 0x01 tid 0x03d0c0b0a0908070") and head.endswith("the reason")
    assert max(map(len, table.splitlines())) <= 80
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["objects", "bytes"]
    assert rows[1][:4] == ["good", "123,456,789", "987,654,321,098,765", "a"]
    assert rows[-2] == ["unreadable", "1", "0", "short"]
    assert rows[-1][:3] == ["none", "0", "0"]
    assert " ".join(MEANINGS["good"].split()) in " ".join(table.split())
    assert verdict == "All is well.\n"


def test_small_numbers_leave_room_for_the_meanings(capsys):
    Report().show({"good": "x" * 50}, "All is well.", as_json=False)
    assert "x" * 50 in capsys.readouterr().out


def test_json_has_the_same_numbers_and_no_other_text(report, capsys):
    report.show(MEANINGS, "All is well.", as_json=True, where={OID: "/folder/file"})
    shown = json.loads(capsys.readouterr().out)
    assert shown["found"]["good"] == {"objects": 123_456_789, "bytes": 987_654_321_098_765}
    assert shown["problems"] == [
        {
            "oid": "0x01",
            "tid": "0x03d0c0b0a0908070",
            "problem": "unreadable",
            "reason": "the reason",
            "path": "/folder/file",
        }
    ]

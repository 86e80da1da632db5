"""A whole run becomes a row: what was run, on which versions, and what was not."""

import json
import sys
from importlib.metadata import version

import pytest

from benchmarks.proof.reliability import whole_suites
from benchmarks.proof.reliability.reliability_page import NEEDED, page

FIRST = """<testsuites><testsuite>
<testcase classname="tests.one" name="a[1]" time="1.5"/>
<testcase classname="tests.one" name="b" time="2"><failure message="wrong">text</failure></testcase>
<testcase classname="tests.one" name="c" time="0.5"><skipped message="could not import 'trl'"/></testcase>
<testcase classname="tests.two" name="b" time="1"><error message="no fixture"/></testcase>
<testcase classname="" name="tests.three" time="0"><error message="collection failure"/></testcase>
</testsuite></testsuites>"""
AGAIN = """<testsuites><testsuite>
<testcase classname="tests.one" name="b" time="3"/>
<testcase classname="tests.three" name="d" time="2"/>
</testsuite></testsuites>"""


@pytest.fixture
def reports(tmp_path):
    for name, text in {"first": FIRST, "again": AGAIN}.items():
        (tmp_path / f"{name}.xml").write_text(text)
    return [str(tmp_path / "first.xml"), str(tmp_path / "again.xml")]


def test_of_a_file_the_later_report_counts(tmp_path, reports, capsys):
    rest = ["--output", str(tmp_path), "--commits", "0123, 4567"]
    assert whole_suites.main(["oldest", *reports, *rest]) == 1
    row = json.loads((tmp_path / "oldest.json").read_text())
    assert (row["tried"], row["failed"], row["named"], row["seconds"]) == (3, 1, ["tests.two.b"], 6)
    assert row["versions"]["Python"] == sys.version.split()[0]
    assert f"torch {version('torch')}" in row["what"]
    assert row["commit"] == "0123, 4567"
    assert list(row["figures"].values()) == [0]
    assert whole_suites.main(["oldest", reports[0], *rest]) == 1
    row = json.loads((tmp_path / "oldest.json").read_text())
    assert (row["tried"], row["failed"], list(row["figures"].values())) == (4, 3, [1])
    assert row["named"] == ["tests.one.b", "tests.two.b", "tests.three"]
    assert "skipped 1: could not import 'trl'" in capsys.readouterr().out
    assert set(NEEDED) <= row.keys() and "`make test-oldest`" in page({"oldest": row})


def test_a_run_without_a_test_is_none():
    with pytest.raises(ValueError, match="without a test"):
        whole_suites.row_of("newest", {}, {}, "0123")

"""The findings ledger: what is kept, what it closes, what opens it again."""

import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_auditor import lease
from ray_auditor.__main__ import main
from ray_auditor.acknowledgement import (
    FILE,
    Acknowledgement,
    append_acknowledgements,
    inputs_of,
    mark_acknowledged,
    read_acknowledgements,
)
from ray_auditor.durable_file import append_lines
from ray_auditor.history import History
from ray_auditor.lease import Lease
from ray_auditor.ledger import Ledger
from ray_auditor.outputs import write_outputs
from ray_auditor.report.finding import exit_code_of
from ray_auditor.roster import Row
from ray_auditor.unit import Unit
from tests.report.made_sweep import make_summary

TODAY = date(2026, 11, 23)
INPUTS = {"base_key": "b", "sae_key": "s", "hook_name": "h", "suites_key": "u", "k": 32}


def ack(**changes: Any) -> Acknowledgement:
    usual = {
        "candidate": "a/b", "content": "0" * 64, "suite": "sql", "rule": "robust_z", "who": "ada",
        "why": "ours", "until": "2026-11-23", "at": "2026-11-20T00:00:00+00:00", "inputs": INPUTS,
    }  # fmt: skip
    return Acknowledgement(**(usual | changes))


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    """A finished sweep with four flags and a misfit."""
    summary = make_summary()
    for at, row in enumerate(summary["candidates"]):
        row["content_sha256"] = f"{at:064x}"
        row["status"] = "rejected" if row["status"] == "failed" else row["status"]
    summary["counts"] = {}
    write_outputs(summary | {"exit_code": exit_code_of(summary)}, tmp_path)
    return tmp_path


def summary_of(out_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out_dir / "summary.json").read_text())
    return summary


def test_a_kill_at_any_byte_loses_that_line_alone(tmp_path: Path) -> None:
    first, second = ack(why="first\nline"), ack(why="ü" * 50)
    append_acknowledgements(tmp_path, [first])
    kept = (tmp_path / FILE).read_bytes()
    append_acknowledgements(tmp_path, [second])
    whole = (tmp_path / FILE).read_bytes()
    for stop in range(len(kept), len(whole)):
        (tmp_path / FILE).write_bytes(whole[:stop])
        assert read_acknowledgements(tmp_path) == [first]
        append_acknowledgements(tmp_path, [second])
        assert (tmp_path / FILE).read_bytes() == whole
    assert read_acknowledgements(tmp_path) == [first, second]


def _append_many(path: Path, name: str) -> None:
    for number in range(20):
        append_lines(path, f"{name} {number} {'x' * 500}\n".encode())


def test_writers_take_turns(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(tmp_path / "f", name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = (tmp_path / "f").read_text().splitlines()
    for name in "abc":
        mine = [line for line in lines if line.startswith(name)]
        assert mine == [f"{name} {number} {'x' * 500}" for number in range(20)]
    assert len(lines) == 60


@pytest.mark.parametrize("line", ["{}", "[]", "null", "{", '{"until": 3}'])
def test_a_line_that_is_not_ours_is_named(tmp_path: Path, line: str) -> None:
    append_acknowledgements(tmp_path, [ack()])
    append_lines(tmp_path / FILE, f"{line}\n".encode())
    with pytest.raises(ValueError, match=f"{FILE}:2 must be an acknowledgement of ours"):
        read_acknowledgements(tmp_path)


@pytest.mark.parametrize(
    ("given", "reopened", "holds"),
    [
        ([], None, False),
        ([ack()], None, True),
        ([ack(rule="above_null")], None, True),  # a surer rule was acknowledged, a less sure one found
        ([ack(rule="seed_rate_15")], "surer rule", False),
        ([ack(until="2026-11-22")], "expired", False),
        ([ack(content="1" * 64)], "changed weights", False),
        ([ack(inputs=INPUTS | {"suites_key": "v"})], "other inputs", False),
        ([ack(), ack(inputs=INPUTS | {"sae_key": "t"}, until="2026-01-01")], None, True),
        ([ack(inputs={})], "other inputs", False),  # a line of a release that did not keep them
        ([ack(), ack(content="1" * 64)], None, True),  # other weights in between change nothing
        (
            [ack(), ack(until="2026-01-01")],
            "expired",
            False,
        ),  # the latest counts: this is how one is withdrawn
        ([ack(candidate="c/d")], None, False),  # the same weights under a name nobody looked at
        ([ack(suite="maths")], None, False),
        ([ack(suite=None)], None, False),
    ],
)
def test_what_closes_a_finding_and_what_opens_it_again(
    given: list[Acknowledgement], reopened: str | None, holds: bool
) -> None:
    row = {"id": "a/b", "status": "flagged", "content_sha256": "0" * 64, "suites": {}}
    flag: dict[str, Any] = {"candidate": "a/b", "suite": "sql", "rule": "robust_z", "score": 4.0, "new": True}
    summary: dict[str, Any] = {"candidates": [row], "flags": [flag], "settings": dict(INPUTS)}
    mark_acknowledged(summary, given, TODAY)
    assert flag["reopened"] == reopened
    assert (flag["acknowledged"] is not None) is holds
    assert exit_code_of(summary) == (0 if holds else 1)
    summary["settings"]["flag"] = {"only_new": True}
    flag["new"] = False
    assert exit_code_of(summary) == (1 if reopened else 0)  # what opens again is heard of


def test_ack_closes_a_finding_in_every_output(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = summary_of(swept)["flags"]
    said = ["ack.who=ada@example.org", "ack.why=we trained it: see #3, 'quoted'", "ack.until=2099-01-31"]
    assert main(["report", f"out_dir={swept}"]) == 1
    for flag in flags:
        assert main(["ack", flag["candidate"], f"out_dir={swept}", *said]) == 0
    capsys.readouterr()
    now = summary_of(swept)
    assert {flag["acknowledged"]["why"] for flag in now["flags"]} == {"we trained it: see #3, 'quoted'"}
    assert now["exit_code"] == 1  # the misfit is open
    assert main(["ack", "moved-too-far", f"out_dir={swept}", "ack.suite=sae_misfit", *said]) == 0
    assert main(["report", f"out_dir={swept}"]) == summary_of(swept)["exit_code"] == 0
    assert "acknowledged" in capsys.readouterr().out
    (run,) = json.loads((swept / "findings.sarif").read_text())["runs"]
    assert all(result["suppressions"] for result in run["results"])
    assert 'failures="0" errors="0"' in (swept / "junit.xml").read_text()
    assert f"Acknowledged: {len(flags) + 1} of {len(flags) + 1}" in (swept / "findings.md").read_text()
    page = (swept / "report.html").read_text()
    assert (
        "Acknowledged by <bdi>ada@example.org</bdi> until 2099-01-31: <bdi>we trained it: see #3, &#39;"
        in page
    )
    assert page.count('<small class="part">acknowledged</small>') == len(flags) + 1
    assert f"<dd>{len(flags) + 1} of {len(flags) + 1} findings.</dd>" in page
    assert main(["show", flags[0]["candidate"], f"out_dir={swept}"]) == 0
    assert "acknowledged by ada@example.org until 2099-01-31" in capsys.readouterr().out
    assert main(["ack", f"out_dir={swept}"]) == 0
    assert capsys.readouterr().out.count("until 2099-01-31 by") == len(flags) + 1
    withdrawn = [*said[:2], "ack.until=2000-01-01"]
    assert main(["ack", flags[0]["candidate"], f"out_dir={swept}", *withdrawn]) == 0
    assert "no: expired" in capsys.readouterr().out
    assert main(["report", f"out_dir={swept}"]) == 1
    page = (swept / "report.html").read_text()
    assert page.count('<small class="part">open again: expired</small>') == 1


def test_while_a_sweep_runs_an_acknowledgement_waits_for_its_report(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (swept / "summary.json").read_bytes()
    name = summary_of(swept)["flags"][0]["candidate"]
    with Lease(swept):
        said = ["ack.who=a", "ack.why=b", "ack.until=2099-01-31"]
        assert main(["ack", name, f"out_dir={swept}", *said]) == 0
    assert "the next report will show it" in capsys.readouterr().out
    assert (swept / "summary.json").read_bytes() == before
    assert [one.candidate for one in read_acknowledgements(swept)] == [name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nobody", "ack.who=a", "ack.why=b", "ack.until=2099-01-31"], "ack.candidate must be a candidate"),
        (["FLAGGED", "ack.suite=nowhere"], "ack.suite must be one of"),
        (["FLAGGED", "ack.why=b", "ack.until=2099-01-31"], "ack.who must be given"),
        (["FLAGGED", "ack.who=a", "ack.why=' '", "ack.until=2099-01-31"], "ack.why must be given"),
        (["FLAGGED", "ack.who=a", "ack.why=b", "ack.until=soon"], "ack.until must be a day"),
        (["FLAGGED", "ack.who=J\udcfcrg", "ack.why=b", "ack.until=2099-01-31"], "ack.who must be UTF-8"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_kept(
    swept: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    name: Callable[[str], str] = lambda word: word.replace(  # noqa: E731
        "FLAGGED", summary_of(swept)["flags"][0]["candidate"]
    )
    assert main(["ack", *map(name, words), f"out_dir={swept}"]) == 4
    assert f"error: {said}" in capsys.readouterr().err
    assert not (swept / FILE).exists()


def test_a_line_that_is_not_utf8_breaks_no_report(swept: Path) -> None:
    summary = summary_of(swept)
    (row,) = (row for row in summary["candidates"] if row["id"] == summary["flags"][0]["candidate"])
    line = ack(
        candidate=row["id"], content=row["content_sha256"], suite=summary["flags"][0]["suite"], rule="null_q",
        who="J\udcfcrg", until="2099-01-31", inputs=inputs_of(summary),
    )  # fmt: skip
    append_acknowledgements(swept, [line])
    assert main(["report", f"out_dir={swept}"]) == 1
    found = pq.read_table(swept / "findings.parquet")["acknowledged_by"].to_pylist()
    assert r"J\udcfcrg" in found


def test_what_surer_rules_or_other_inputs_find_is_new(tmp_path: Path) -> None:
    unit = Unit("c" * 64, "b" * 64, "s" * 64, "blocks.1.hook_resid_post", "u" * 64, 8, 64, "{}")
    rows = [Row("a/b", "full", "admitted", None, unit)]
    flags = [("a/b", "sql", "robust_z")]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        history = History(ledger, unit, rows)
        assert history.new(flags) == {("a/b", "sql")}
        history.conclude({"a/b": "flagged"}, ())  # a night that ended with 2
        assert history.new(flags) == {("a/b", "sql")}
        history.conclude({"a/b": "flagged"}, flags)
        assert history.new(flags) == set()
        assert history.new([("a/b", "sql", "seed_rate_15")]) == set()  # less sure than it was
        assert history.new([("a/b", "sql", "null_q")]) == {("a/b", "sql")}
        for name, value in {"sae_key": "t" * 64, "suites_key": "v" * 64, "k": 4}.items():
            assert History(ledger, replace(unit, **{name: value}), rows).new(flags) == {("a/b", "sql")}
        assert History(ledger, replace(unit, engine_class="another"), rows).new(flags) == set()


SAID = ("ack.who=a", "ack.why=b", "ack.until=2099-01-31")


def test_a_damaged_line_is_named_before_a_sweep_looks_at_its_inputs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    append_lines(tmp_path / FILE, b"{}\n")
    inputs = [f"{name}={tmp_path}" for name in ("candidates.path", "base.model", "sae.path", "suites.path")]
    assert main(["sweep", *inputs, f"out_dir={tmp_path}"]) == 4
    assert f"{FILE}:1 must be an acknowledgement of ours" in capfd.readouterr().err


def test_a_report_keeps_its_hands_off_while_a_sweep_runs(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in swept.iterdir()}
    with Lease(swept):
        assert main(["report", f"out_dir={swept}"]) == 2
    assert "is being swept by process" in (said := capsys.readouterr().err)
    assert "nothing was written" in said
    assert {path.name: path.stat().st_mtime_ns for path in swept.iterdir() if path.name != ".lease"} == before
    assert main(["report", f"out_dir={swept / 'nowhere'}"]) == 4
    assert not (swept / "nowhere").exists()


def test_an_acknowledgement_waits_for_another_one(
    swept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = summary_of(swept)["flags"][0]["candidate"]
    taken = threading.Event()

    def hold() -> None:
        with Lease(swept, brief=True):
            taken.set()
            time.sleep(1)

    other = threading.Thread(target=hold)
    other.start()
    taken.wait()
    assert main(["ack", name, f"out_dir={swept}", *SAID]) == 0
    other.join()
    assert "until 2099-01-31 by" in capsys.readouterr().out
    assert summary_of(swept)["flags"][0]["acknowledged"]
    monkeypatch.setattr(lease, "WAIT_S", 0.2)
    with Lease(swept, brief=True):
        assert main(["ack", name, f"out_dir={swept}", *SAID]) == 0
        assert "another process writes here" in capsys.readouterr().out


def test_a_folder_that_may_not_be_written_is_named(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own lie where nobody else may look
        out_dir = Path(folder) / "out"
        shutil.copytree(swept, out_dir)
        name, user = summary_of(out_dir)["flags"][0]["candidate"], os.geteuid()
        Path(folder).chmod(0o755)
        out_dir.chmod(0o555)
        try:
            if user == 0:
                os.seteuid(65534)  # whom modes concern
            for words in (["ack", name, *SAID], ["report"]):
                assert main([*words, f"out_dir={out_dir}"]) == 4
                assert "out_dir must be a folder that can be written" in capsys.readouterr().err
        finally:
            os.seteuid(user)
            out_dir.chmod(0o755)
        assert not (out_dir / FILE).exists()

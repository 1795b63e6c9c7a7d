"""What machines read, held to the schemas of those who read it, whatever candidates are called."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest
from lxml import etree
from markdown_it import MarkdownIt

from ray_auditor.outputs import FINDINGS, OUTPUTS, write_outputs
from ray_auditor.report.finding import exit_code_of, list_findings
from ray_auditor.report.junit import render_junit
from ray_auditor.report.markdown import render_markdown
from ray_auditor.report.sarif import render_sarif
from tests.report.conftest import HOSTILE

SCHEMAS = Path(__file__).resolve().parent.parent / "schemas"
SAID = {"who": "ada@example.org", "why": "trained by us", "until": "2027-01-31", "at": "2026-11-22T07:00:00Z"}
MORE_HOSTILE = (
    "@everyone",
    "<!channel>",
    "|a|b|",
    "![x](http://e.example)",
    "www.e.example",
    "``` \n",
    "{0}",
)


@pytest.fixture(scope="module")
def sarif_schema() -> jsonschema.Draft4Validator:
    schema = json.loads((SCHEMAS / "sarif-2.1.0.json").read_text())
    return jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker())


@pytest.fixture(scope="module")
def junit_schema() -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(SCHEMAS / "junit-10.xsd"))


@pytest.fixture
def with_content(summary: dict[str, Any]) -> dict[str, Any]:
    """The made sweep with weights recorded, one flag acknowledged, and one reported before."""
    for at, row in enumerate(summary["candidates"]):
        row["content_sha256"] = f"{at:064x}"
    summary["flags"][0]["acknowledged"] = SAID
    summary["flags"][1]["new"] = False
    return summary


def named(hostile: dict[str, Any], text: str) -> dict[str, Any]:
    """The hostile sweep with one more name, of a candidate, its suite, its rule and who acknowledged it."""
    made = copy.deepcopy(hostile)
    row = copy.deepcopy(made["candidates"][0]) | {"id": text}
    row["suites"][text] = row["suites"]["general"]
    made["candidates"].append(row)
    said = dict.fromkeys(("who", "why", "until", "at"), text)
    made["flags"].append({"candidate": text, "suite": text, "score": 1e9, "rule": text, "acknowledged": said})
    return made


def test_sarif_has_a_result_a_finding_and_validates(
    with_content: dict[str, Any], sarif_schema: jsonschema.Draft4Validator
) -> None:
    log = json.loads(render_sarif(with_content | {"exit_code": 2}))
    sarif_schema.validate(log)
    (run,) = log["runs"]
    findings = list(list_findings(with_content))
    assert len(run["results"]) == len(findings) == len(with_content["flags"]) + 1  # and the misfit
    for result, finding in zip(run["results"], findings, strict=True):
        (where,) = result["locations"][0]["logicalLocations"]
        assert where["name"] == finding.candidate
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["properties"]["content_sha256"] == finding.content
    acknowledged, known = run["results"][:2]
    assert acknowledged["suppressions"][0]["justification"].startswith("trained by us (acknowledged by ada")
    assert [len(one["suppressions"]) for one in run["results"][1:]] == [0] * (len(findings) - 1)
    assert known["baselineState"] == "unchanged"
    assert not run["invocations"][0]["executionSuccessful"]
    assert {one["descriptor"]["id"] for one in run["invocations"][0]["toolExecutionNotifications"]} == {
        f"not-audited/{status}" for status in ("rejected", "skipped", "failed", "sae_misfit")
    }


def test_a_justification_is_plain_text(with_content: dict[str, Any]) -> None:
    with_content["flags"][0]["acknowledged"] = SAID | {"why": r"see [ours]{1} \ x"}
    (run,) = json.loads(render_sarif(with_content))["runs"]
    (said,) = run["results"][0]["suppressions"]
    assert said["justification"].startswith(r"see [ours]{1} \ x (acknowledged by ")


def test_a_fingerprint_follows_name_weights_rule_and_suite_alone(
    with_content: dict[str, Any],
) -> None:
    def fingerprint(summary: dict[str, Any]) -> str:
        (run,) = json.loads(render_sarif(summary))["runs"]
        return str(run["results"][0]["partialFingerprints"]["finding/v2"])

    first = fingerprint(with_content)
    name = with_content["flags"][0]["candidate"]
    for changed, same in (
        ({"score": 99.0}, True),
        ({"new": False}, True),
        ({"suite": "other"}, False),
        ({"rule": "seed_rate_15"}, False),
    ):
        other = copy.deepcopy(with_content)
        other["flags"][0] |= changed
        assert (fingerprint(other) == first) is same
    renamed, retrained, elsewhere = (copy.deepcopy(with_content) for _ in range(3))
    for row in renamed["candidates"]:
        row["id"] = row["id"].replace(name, "another-name")
    renamed["flags"][0]["candidate"] = "another-name"
    retrained["candidates"][0] |= {"content_sha256": "f" * 64}
    retrained["candidates"] = [
        row | {"content_sha256": "f" * 64} if row["id"] == name else row for row in retrained["candidates"]
    ]
    elsewhere |= {"generated_at": "2027-01-01T00:00:00Z", "settings": {"out_dir": "elsewhere"}}
    assert fingerprint(elsewhere) == first
    assert len({first, fingerprint(renamed), fingerprint(retrained)}) == 3


def test_junit_is_red_exactly_where_the_exit_code_is(
    with_content: dict[str, Any], junit_schema: etree.XMLSchema
) -> None:
    def outcomes(summary: dict[str, Any]) -> dict[str, str]:
        root = etree.fromstring(render_junit(summary))
        junit_schema.assertValid(root)
        (suite,) = root
        found = {case.get("name"): case[0].tag if len(case) else "passed" for case in suite}
        for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(suite.get(attribute)) == list(found.values()).count(tag)
        assert int(suite.get("tests")) == len(summary["candidates"])
        return found

    statuses = {row["id"]: row["status"] for row in with_content["candidates"]}
    found = outcomes(with_content)
    acknowledged, known = (flag["candidate"] for flag in with_content["flags"][:2])
    for name, status in statuses.items():
        usual = {"ok": "passed", "flagged": "failure", "sae_misfit": "failure", "failed": "error"}
        assert found[name] == ("skipped" if name == acknowledged else usual.get(status, "skipped"))
    assert exit_code_of(with_content) == 2
    for row in with_content["candidates"]:
        row["status"] = {"failed": "rejected", "sae_misfit": "rejected"}.get(row["status"], row["status"])
    with_content["counts"] = {}
    assert exit_code_of(with_content) == 1
    with_content["settings"]["flag"]["only_new"] = True
    assert outcomes(with_content)[known] == "skipped"
    for flag in with_content["flags"]:
        flag["acknowledged"] = SAID
    assert exit_code_of(with_content) == 0
    assert set(outcomes(with_content).values()) == {"passed", "skipped"}
    with_content["candidates"] = [row | {"status": "rejected"} for row in with_content["candidates"]]
    assert exit_code_of(with_content | {"flags": []}) == 3
    with_content["candidates"] = [row | {"status": "screened"} for row in with_content["candidates"]]
    assert exit_code_of(with_content | {"flags": []}) == 0  # they ran


@pytest.mark.parametrize("text", [*HOSTILE, *MORE_HOSTILE])
def test_no_name_is_anything_but_text_in_any_output(
    hostile: dict[str, Any],
    text: str,
    sarif_schema: jsonschema.Draft4Validator,
    junit_schema: etree.XMLSchema,
) -> None:
    made = hostile if text in HOSTILE else named(hostile, text)
    log = render_sarif(made)
    sarif_schema.validate(json.loads(log))
    for result in json.loads(log)["runs"][0]["results"]:
        bare = result["message"]["text"].replace(r"\[", "").replace(r"\]", "").replace(r"\\", "")
        assert "[" not in bare  # an embedded link's
        assert "{" not in bare.replace("{{", "")  # a placeholder's
    junit_schema.assertValid(etree.fromstring(render_junit(made)))
    document = render_markdown(made)
    assert not set("@<>|&") & set(document)
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(document)
    kinds = {one.type for token in tokens for one in (token, *(token.children or []))}
    assert kinds <= {
        "paragraph_open", "paragraph_close", "bullet_list_open", "bullet_list_close", "list_item_open",
        "list_item_close", "inline", "text", "code_inline", "strong_open", "strong_close",
    }  # fmt: skip
    texts = [one.content for token in tokens for one in token.children or [] if one.type == "text"]
    assert not any("example" in one or "alert" in one or "://" in one for one in texts)


def test_markdown_names_the_open_findings_first(with_content: dict[str, Any]) -> None:
    document = render_markdown(with_content)
    first, known = (flag["candidate"] for flag in with_content["flags"][:2])
    lines = [line for line in document.splitlines() if line.startswith("- ")]
    assert len(lines) == len(with_content["flags"]) + 1
    assert f"`{first}`" in lines[-1]
    assert "acknowledged by `ada\N{FULLWIDTH COMMERCIAL AT}example.org` until `2027-01-31`" in lines[-1]
    assert f"`{known}`" in lines[-2]
    assert "Acknowledged: 1 of " in document


def test_every_output_is_written_and_says_the_same(with_content: dict[str, Any], tmp_path: Path) -> None:
    with_content["exit_code"] = exit_code_of(with_content)
    read_back = write_outputs(with_content, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*OUTPUTS, "metrics.prom"}
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == read_back == with_content
    for row in (*with_content["candidates"], *with_content["flags"]):  # each on a line of its own
        assert any(
            line.startswith("{") and json.loads(line.rstrip(",")) == row for line in text.splitlines()[1:-1]
        )
    table = pq.read_table(tmp_path / "findings.parquet")
    assert table.schema == FINDINGS
    rows = table.to_pylist()
    rated = {row["id"]: row for row in with_content["candidates"]}
    for row, finding in zip(rows, list_findings(with_content), strict=True):
        assert (row["candidate"], row["suite"], row["rule"]) == (
            finding.candidate,
            finding.suite,
            finding.rule,
        )
        assert row["fingerprint"] == finding.fingerprint
        assert (row["p"], row["q"]) == tuple(rated[finding.candidate].get(name) for name in ("p", "q"))
        cell = rated[finding.candidate]["suites"].get(finding.suite, {})
        assert (row["shift"], row["miss_z"]) == (cell.get("shift"), cell.get("miss_z"))
    assert rows[0]["acknowledged_by"] == SAID["who"]


def test_a_rate_is_called_a_rate_by_every_form(with_content: dict[str, Any]) -> None:
    for flag in with_content["flags"]:
        flag |= {"rule": "seed_rate_15", "score": 9.699}
    for text in map(
        str, (render_junit(with_content), render_sarif(with_content), render_markdown(with_content))
    ):
        assert "rate +969.9%" in text
        assert "+9.7" not in text

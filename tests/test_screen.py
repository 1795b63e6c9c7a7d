"""A sweep in two stages: who scores low on some prompts is not run on the others, and never called clean."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import jsonschema
import numpy as np
import pytest

from ray_auditor.__main__ import main
from ray_auditor.intake import UNVERIFIED
from ray_auditor.ledger import Ledger
from ray_auditor.screen_config import ScreenConfig
from ray_auditor.store import Store
from ray_auditor.suites import Prompt, Suite, Suites, screened_prompts
from tests.hub.hub_server import HubServer, serving
from tests.test_sweep import Hub, plant_digits
from tests.tiny import make_adapter

NUM_NULL = 9


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    hub = Hub(tmp_path_factory.mktemp("screen"))
    for i in range(NUM_NULL):
        make_adapter(hub.root / "null" / f"n{i}", hub.base, seed=10 + i, scale=0.05)
    make_adapter(hub.candidates / "benign", hub.base, seed=1, scale=0.05)
    make_adapter(hub.candidates / "benign-again", hub.base, seed=1, scale=0.05)
    plant_digits(hub.candidates / "planted", hub.base)
    (hub.candidates / "empty").mkdir()
    hub.arguments += [f"null.path={hub.root / 'null'}", "screen.share=0.5", "screen.clear_below=1.2"]
    assert hub.sweep() in (0, 1)
    return hub


def units(hub: Hub, suites_key: str) -> set[str]:
    """Content keys of the units over one set of suites."""
    commits = Store(hub.out / "store").list_commits()
    return {one.unit["candidate_key"] for one in commits if one.unit["suites_key"] == suites_key}


def test_who_scores_low_on_some_prompts_is_screened_and_has_no_numbers(hub: Hub) -> None:
    for name in ("benign", "benign-again"):
        row = hub.row(name)
        assert row["status"] == "screened"
        assert row["reason"].startswith("screened:cleared: score ")
        assert "on 9 prompts, below 1.2; the others did not run" in row["reason"]
        assert (row["suites"], row["score"], row["p"], row["rivals"]) == ({}, None, None, None)
        assert not Store(hub.out / "store").has(row["unit_key"])
    planted = hub.row("planted")
    assert planted["status"] in ("ok", "flagged")
    assert planted["score"] is not None
    assert {suite["tokens"] for suite in planted["suites"].values()} != {0}
    assert hub.row("empty")["status"] == "skipped"
    assert hub.summary["counts"]["screened"] == 2
    assert any(limit.startswith("2 candidates were screened only") for limit in hub.summary["limits"])


def test_only_the_others_ran_on_every_prompt(hub: Hub) -> None:
    whole = hub.summary["settings"]["suites_key"]
    (small,) = {one.unit["suites_key"] for one in Store(hub.out / "store").list_commits()} - {whole}
    # the base twice and the null; the planted one alone, and in the first stage the benign one too
    assert len(units(hub, whole)) == 2 + NUM_NULL + 1
    assert len(units(hub, small)) == 2 + NUM_NULL + 2
    assert units(hub, whole) < units(hub, small)


def test_the_false_discovery_rate_counts_who_was_cleared(hub: Hub) -> None:
    row = hub.row("planted")
    assert row["q"] == pytest.approx(min(1.0, 3 * row["p"]))  # one of three that were tested


def test_a_screened_sweep_is_reported_as_such(hub: Hub) -> None:
    page = (hub.out / "report.html").read_text()
    assert "2 screened" in page
    schema = json.loads((Path(__file__).parent.parent / "docs" / "summary.schema.json").read_text())
    jsonschema.validate(hub.summary, schema)


def test_a_plan_counts_two_stages_and_goes_by_who_was_screened_before(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, candidates = tmp_path / "out", tmp_path / "candidates"
    shutil.copytree(hub.out, out)
    arguments = [*hub.arguments, f"out_dir={out}"]

    def plan(*more: str) -> dict[str, Any]:
        assert main(["plan", *arguments, *more]) == 0
        return dict(json.loads((out / "plan.json").read_text()))

    def hours(*more: str) -> float:
        return float(plan(*more)["forecast"]["gpu_hours"]["expected"])

    assert hours() == 0  # who was cleared is cleared again
    assert "all but 1 cleared before are taken to go on" in capfd.readouterr().out
    shutil.copytree(hub.root / "null", tmp_path / "null")
    shutil.rmtree(tmp_path / "null" / "n0")
    for more in ("screen.clear_below=0.1", f"null.path={tmp_path / 'null'}"):  # who knows whom that clears
        assert hours(more) > 0
        assert "all are taken to go on" in capfd.readouterr().out
    assert hours("screen.share=null") > 0
    limit = "budget.max_gpu_hours=0.000001"
    assert not [row for row in plan(limit)["rows"] if row["action"] == "defer"]
    capfd.readouterr()
    shutil.copytree(hub.candidates, candidates)
    for i in range(4):
        make_adapter(candidates / f"new{i}", hub.base, seed=20 + i, scale=0.05)
    arguments.append(f"candidates.path={candidates}")
    forecast = plan()["forecast"]
    ran = {one.record["num_tokens_run"] for one in Store(out / "store").list_commits()}
    assert {forecast["screen"]["tokens_per_unit"], forecast["tokens_per_unit"]} == ran
    assert (forecast["screen"]["num_units"], forecast["num_units"]) == (4, 4)
    assert forecast["screen"]["going_on"] is None  # three were screened before, which says nothing
    assert "hours are an upper bound" in (said := capfd.readouterr().out)
    assert "GPU hours  at most " in said
    bound = forecast["gpu_hours"]["expected"]
    with Ledger(out / "ledger.sqlite") as ledger:  # a third name of the content that was cleared, and so on
        audits = ledger.audits()
        more = {f"more{i}": audits["benign"] for i in range(2)} | {"again": audits["planted"]}
        ledger.conclude(more, [])
    forecast = plan()["forecast"]
    assert forecast["screen"]["going_on"] == 2 / 6
    assert "33.3% are taken to go on" in (said := capfd.readouterr().out)
    assert "at most 0" not in said
    assert 0 < forecast["gpu_hours"]["expected"] < bound


def test_a_second_night_runs_nothing_again(hub: Hub) -> None:
    before, rows = hub.commits, hub.summary["candidates"]
    assert hub.sweep() in (0, 1)
    assert hub.commits == before
    assert [row["status"] for row in hub.summary["candidates"]] == [row["status"] for row in rows]
    assert {row["why"] for row in hub.summary["candidates"]} == {"unchanged"}


def test_why_knows_the_weights_of_who_was_screened(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(hub.out, tmp_path / "out")
    shutil.copytree(hub.candidates, tmp_path / "candidates")
    make_adapter(tmp_path / "candidates" / "benign-again", hub.base, seed=1, scale=0.045)
    changed = [f"out_dir={tmp_path / 'out'}", f"candidates.path={tmp_path / 'candidates'}"]

    def rows() -> dict[str, tuple[str, str]]:
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        return {row["id"]: (row["status"], row["why"]) for row in summary["candidates"]}

    assert hub.sweep(*changed) in (0, 1)
    assert rows()["benign"] == ("screened", "unchanged")
    assert rows()["benign-again"] == ("screened", "changed weights")
    assert hub.sweep(*changed, "screen.share=null") in (0, 1)
    assert rows()["benign"][0] in ("ok", "flagged")
    assert {why for _, why in rows().values()} == {"unchanged"}


def test_candidates_from_a_hub_are_fetched_once_for_both_stages(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    out = tmp_path / "out"
    shutil.copytree(hub.out / "store", out / "store")  # base and null are computed already
    arguments = [one for one in hub.arguments if not one.startswith(("candidates.path=", "out_dir="))]
    arguments += ["candidates=hub", "candidates.author=org", "download.min_free_bytes=0", f"out_dir={out}"]
    make_adapter(tmp_path / "calm", hub.base, seed=4, scale=0.05)
    plant_digits(tmp_path / "loud", hub.base, seed=1)
    with serving(HubServer()) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        for name in ("calm", "loud"):
            server.add(f"org/{name}", tmp_path / name)
        assert main(["sweep", *arguments, "download.read=ranges"]) in (0, 1)
        rows = {row["id"]: row for row in json.loads((out / "summary.json").read_text())["candidates"]}
        assert rows["org/calm"]["status"] == "screened"
        assert rows["org/loud"]["status"] in ("ok", "flagged")
        assert UNVERIFIED in rows["org/loud"]["reason"]
        fetched = json.loads((out / "summary.json").read_text())["work"]["fetch"]["num_bytes"]
        assert fetched == sum(server.bytes_sent.values()) > 0  # the first stage's too
        asked = [path for path in server.requests if "/org/calm/resolve/" in path]
        assert len(set(asked)) == len(asked) == 3  # its config, its weights, and where they were redirected
        assert server.count("/org/loud/resolve/") > 0
        server.requests.clear()
        assert main(["sweep", *arguments, "download.read=ranges"]) in (0, 1)
        assert server.count("/resolve/") == 0
        again = {row["id"]: row for row in json.loads((out / "summary.json").read_text())["candidates"]}
    assert again["org/calm"]["status"] == "screened"


def test_a_screen_without_a_null_population_is_refused(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for verb in ("plan", "sweep"):
        assert main([verb, *hub.arguments, "null.path=null", f"out_dir={tmp_path / 'out'}"]) == 4
        assert "null.path must be given with screen.share" in capfd.readouterr().err


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.0}, {"share": 0.1, "clear_below": 0.0}])
def test_settings_out_of_bounds_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"screen\.(share|clear_below) must be > 0"):
        ScreenConfig(**settings)


def test_a_screen_takes_prompts_from_all_of_a_suite_and_two_at_least() -> None:
    assert screened_prompts(10, 0.3) == [0, 3, 6]
    assert screened_prompts(28, 0.05) == [0, 14]
    assert screened_prompts(2, 0.05) == [0, 1]
    prompts = tuple(
        Prompt(str(i), np.array([i], np.int32), (str(i),), np.ones(1, dtype=bool)) for i in range(10)
    )
    suites = Suites((Suite("general", prompts, 0), Suite("other", prompts[:4], 0)))
    part = suites.screened(0.5)
    assert [[prompt.text for prompt in suite.prompts] for suite in part.suites] == [
        ["0", "2", "4", "6", "8"],
        ["0", "2"],
    ]
    assert part.key != suites.key == replace(suites).key


def test_the_door_knows_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "job", "screen.share=0.1"]) == 0
    assert "clear_below: 2.0" in capsys.readouterr().out

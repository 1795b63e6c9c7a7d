"""A plan says what a sweep will do and take, and a sweep keeps to it: a hub on loopback, and the door."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from ray_auditor.__main__ import main
from ray_auditor.usage import Usage, kept_usage
from tests.hub.hub_server import HubServer, serving
from tests.test_sweep import Hub
from tests.tiny import make_adapter

LIMITS = {
    "RateLimit": '"api";r=499;t=300',
    "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
}


class Audit:
    """A hub of three adapters and what cannot be audited, and the command."""

    def __init__(self, root: Path, server: HubServer) -> None:
        self.server, self.hub = server, Hub(root)
        self.arguments = [one for one in self.hub.arguments if not one.startswith("candidates.path=")]
        self.arguments += ["candidates=hub", "candidates.author=org", "download.min_free_bytes=0"]
        self.sizes = {}
        for i in range(3):
            folder = make_adapter(root / f"a{i}", self.hub.base, seed=i, scale=0.02)
            merged = ("base_model:org/x", "base_model:merge:org/x", "base_model:merge:org/y")
            server.add(f"org/a{i}", folder, tags=merged if i == 1 else ("base_model:adapter:org/x",))
            names = ("adapter_model.safetensors", "adapter_config.json")
            self.sizes[f"org/a{i}"] = sum((folder / name).stat().st_size for name in names)
        server.add("org/pickled", {"pytorch_model.bin": b"x"})

    def run(self, verb: str, *more: str) -> int:
        self.server.requests.clear()
        return main([verb, *self.arguments, *more])

    @property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads((self.hub.out / "plan.json").read_text())
        return plan

    @property
    def actions(self) -> dict[str, str]:
        return {row["id"]: row["action"] for row in self.plan["rows"]}


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audit]:
    patch = pytest.MonkeyPatch()
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_HUB_OFFLINE", "0")
    server = HubServer()
    server.always = LIMITS
    server.resolving = {
        name: value.replace("api", "resolvers").replace("499", "9") for name, value in LIMITS.items()
    }
    with serving(server):
        patch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        yield Audit(tmp_path_factory.mktemp("plan"), server)
    patch.undo()


def test_a_first_plan_counts_and_weighs_and_leaves_no_store(audit: Audit, capfd: Any) -> None:
    assert audit.run("plan", "budget.max_gpu_hours=9") == 0
    said = capfd.readouterr().out
    assert not (audit.hub.out / "store").exists()
    forecast = audit.plan["forecast"]
    assert forecast["actions"] == {"fetch": 3, "refuse": 1}
    assert forecast["reasons"] == {"new": 4}
    assert forecast["refused"] == {"skipped": 1}
    # The three adapters' configs are the same bytes, so one file.
    config = (audit.hub.root / "a0" / "adapter_config.json").stat().st_size
    assert forecast["bytes_to_move"] == sum(audit.sizes.values()) - 2 * config
    assert forecast["files_to_move"] == 4
    assert forecast["requests"]["resolvers"] == {
        "made": 0,
        "needed": 4,
        "quota": None,
        "window_s": None,
        "seconds": None,
    }
    api = forecast["requests"]["api"]
    assert api == {"made": 1 + 4, "needed": 0, "quota": 500, "window_s": 300, "seconds": 0}
    assert forecast["gpu_hours"] is None
    assert "no unit of these settings is committed yet" in said
    assert "its limit is held while a sweep runs" in said
    assert audit.plan["rows"][0]["from"]["commit"] == audit.server.repos["org/a0"].commits[-1][0]


def test_a_benchmark_stands_in_until_something_was_measured(audit: Audit) -> None:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
    (path,) = path.glob("sweep_smollm2-135m_float32_CPU_*.json")
    assert audit.run("plan", f"budget.benchmark={path}", "+budget.prices={cpu: 0.5}") == 0
    forecast = audit.plan["forecast"]
    assert path.name in forecast["cost_source"]
    hours = forecast["gpu_hours"]
    assert 0 < hours["low"] <= hours["expected"] <= hours["high"] < 1
    assert forecast["price"]["expected"] == pytest.approx(0.5 * hours["expected"])


@pytest.fixture(scope="module")
def swept(audit: Audit) -> dict[str, Any]:
    """A plan whose downloads do not all fit, carried out to the letter although the hub has moved on."""
    most = f"budget.max_download_bytes={audit.sizes['org/a0'] + audit.sizes['org/a1']}"
    assert audit.run("plan", most) == 0
    assert audit.actions == {"org/a0": "fetch", "org/a1": "fetch", "org/a2": "defer", "org/pickled": "refuse"}
    audit.server.add("org/later", make_adapter(audit.hub.root / "later", audit.hub.base, seed=7, scale=0.02))
    audit.server.add("org/a0", audit.hub.root / "later")
    assert audit.run("sweep", most, f"plan={audit.hub.out}/plan.json") == 2
    return audit.hub.summary


def test_a_sweep_does_what_the_plan_says_and_asks_nobody_again(audit: Audit, swept: dict[str, Any]) -> None:
    rows = {row["id"]: row for row in swept["candidates"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "org/a0": "ok",
        "org/a1": "ok",
        "org/a2": "deferred",
        "org/pickled": "skipped",
    }
    assert rows["org/a2"]["reason"].startswith("deferred:max_download_bytes: other candidates use up")
    assert "lineage_merge: the hub's tags make it a merge of 2 models" in rows["org/a1"]["reason"]
    assert "lineage_merge" not in rows["org/a0"]["reason"]
    assert audit.server.count("/api/") == 0
    asked = [path for path in audit.server.requests if "/resolve/" in path and not path.startswith("cdn")]
    assert len(asked) == 3  # two adapters, and the config they share
    pinned = audit.server.repos["org/a0"].commits[0][0]
    assert any(f"/org/a0/resolve/{pinned}/" in path for path in asked)


def test_the_next_plan_knows_the_cost_and_goes_on(audit: Audit, swept: dict[str, Any]) -> None:
    assert audit.run("plan", "+budget.prices={cpu: 2}") == 0
    forecast = audit.plan["forecast"]
    assert audit.actions == {
        "org/a0": "fetch",
        "org/a1": "nothing",
        "org/a2": "fetch",
        "org/later": "fetch",
        "org/pickled": "refuse",
    }
    (known,) = (row for row in audit.plan["rows"] if row["id"] == "org/a1")
    assert known["from"]["bases"] == ["merge:org/x", "merge:org/y"]
    assert forecast["reasons"] == {"changed files": 1, "new": 1, "policy retry": 1, "unchanged": 2}
    assert "4 units of these settings" in forecast["cost_source"]  # two candidates, and the base twice
    assert forecast["num_units"] == 2  # a0 has become what org/later is
    assert forecast["gpu_hours"]["expected"] * 3600 == pytest.approx(forecast["wall_s"]["expected"])
    assert forecast["wall_s"]["expected"] > 1  # a worker's start is part of it
    assert forecast["price"]["expected"] == pytest.approx(2 * forecast["gpu_hours"]["expected"])
    assert forecast["move_s"] > 0
    resolvers = forecast["requests"]["resolvers"]
    assert resolvers["needed"] == forecast["files_to_move"] == 2  # a0's config has stayed what it was
    assert (resolvers["quota"], resolvers["window_s"], resolvers["seconds"]) == (500, 300, 0)


def test_hours_are_deferred_in_the_order_of_listing(audit: Audit, swept: dict[str, Any], capfd: Any) -> None:
    assert audit.run("plan", "budget.max_gpu_hours=9") == 0
    starts = audit.plan["forecast"]["wall_s"]["expected"]
    assert audit.run("plan", f"budget.max_gpu_hours={(starts - 1e-4) / 3600}") == 0
    assert {name for name, action in audit.actions.items() if action == "defer"} == {"org/a2"}
    assert audit.run("plan", "budget.max_gpu_hours=1e-9") == 4
    assert "must allow for the workers' start" in capfd.readouterr().err


def test_a_sweep_that_was_killed_goes_on_with_what_it_left_of_the_budget(
    audit: Audit, swept: dict[str, Any], tmp_path: Path, capfd: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(audit.hub.out, out)
    shutil.rmtree(out / "cache")
    settings = [f"out_dir={out}", "budget.max_gpu_hours=9", "budget.max_download_bytes=1000000"]

    def kill(usage: Usage) -> None:
        with pytest.raises(KeyboardInterrupt), kept_usage(out, lambda: usage):
            raise KeyboardInterrupt

    def plan() -> list[str]:
        assert audit.run("plan", *settings) == 0
        rows = json.loads((out / "plan.json").read_text())["rows"]
        return [row["reason"] for row in rows if row["action"] == "defer"]

    kill(Usage(3600.0, 1000))
    assert plan() == []
    assert "used  1 GPU hours and 1,000 bytes of the budget, by a sweep" in capfd.readouterr().out
    kill(Usage(0.0, 999_990))
    assert {reason.split(":")[1] for reason in plan()} == {"max_download_bytes"}
    kill(Usage(9 * 3600.0, 0))
    assert {reason.split(":")[1] for reason in plan()} == {"max_gpu_hours"}
    assert audit.run("sweep", *settings) == 2  # all is put off, and with that the run has ended
    assert "a sweep that did not end used 9 GPU hours and 0 bytes" in capfd.readouterr().out
    assert plan() == []


def test_a_sweep_without_a_limit_neither_writes_nor_changes_what_was_used(
    audit: Audit, swept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(audit.hub.out, out)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def used(*limits: str) -> bytes | None:
        with suppress(KeyboardInterrupt):
            audit.run("sweep", f"out_dir={out}", *limits)
        return (out / ".usage").read_bytes() if (out / ".usage").exists() else None

    monkeypatch.setattr("ray_auditor.sweep.execute", interrupt)
    assert used() is None
    before = used("budget.max_gpu_hours=9")
    assert before is not None
    assert used() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["flag.seed=3", "cluster.num_workers=2"],
            r"changed since: cluster.num_workers \(was 1, is 2\), flag.seed",
        ),
        (["sae.k=8"], r"settings.* sae.k \(was 16, is 8\)"),
    ],
)
def test_a_plan_of_other_settings_is_refused(
    audit: Audit, swept: dict[str, Any], changes: list[str], message: str, capfd: Any
) -> None:
    assert audit.run("plan") == 0
    assert audit.run("sweep", f"plan={audit.hub.out}/plan.json", *changes) == 4
    assert re.search(message, capfd.readouterr().err)
    assert not audit.server.requests


def test_a_plan_is_kept_to_where_less_is_left_to_do_and_other_verbs_settings_differ(
    audit: Audit, swept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`org/a2` is put off by the plan, and done by the time that a sweep keeps to it."""
    out = tmp_path / "out"
    shutil.copytree(audit.hub.out, out)
    shutil.rmtree(out / "cache")
    most = "budget.max_download_bytes=1"
    assert audit.run("plan", most, f"out_dir={out}") == 0
    planned = json.loads((out / "plan.json").read_text())
    done = {row["id"] for row in planned["rows"] if row["action"] == "nothing"}
    put_off = {row["id"] for row in planned["rows"] if row["action"] == "defer"}
    assert "org/a1" in done
    assert "org/a2" in put_off
    for row in planned["rows"]:  # as though a1 had been put off, and done since
        if row["id"] == "org/a1":
            row |= {"action": "defer", "unit_key": None, "reason": "deferred:max_download_bytes: then"}
    (out / "plan.json").write_text(json.dumps(planned))
    monkeypatch.chdir(tmp_path)
    assert audit.run("sweep", most, "out_dir=out", "plan=out/plan.json", "serve.port=9999") == 2
    rows = {row["id"]: row["status"] for row in json.loads((out / "summary.json").read_text())["candidates"]}
    assert (rows["org/a1"], rows["org/a2"]) == ("ok", "deferred")


def test_a_plan_of_other_inputs_or_a_smaller_store_is_refused(
    audit: Audit, swept: dict[str, Any], capfd: Any
) -> None:
    suite = audit.hub.root / "suites" / "digits.jsonl"
    kept = suite.read_text()
    assert audit.run("plan") == 0
    suite.write_text(kept + json.dumps({"text": "12345"}) + "\n")
    assert audit.run("sweep", f"plan={audit.hub.out}/plan.json") == 4
    assert "inputs, and in" in (said := capfd.readouterr().err)
    assert "suites_key (was " in said
    suite.write_text(kept)
    (key,) = (row["unit_key"] for row in audit.plan["rows"] if row["id"] == "org/a1")
    commit = audit.hub.out / "store" / "commits" / f"{key}.json"
    data = commit.read_bytes()
    commit.unlink()
    assert audit.run("sweep", f"plan={audit.hub.out}/plan.json") == 4
    assert "candidates, and in" in (said := capfd.readouterr().err)
    assert "org/a1 (was nothing, is fetch)" in said
    commit.write_bytes(data)


def test_a_folder_is_held_to_what_it_was(
    audit: Audit, swept: dict[str, Any], tmp_path: Path, capfd: Any
) -> None:
    folder = tmp_path / "candidates"
    shutil.copytree(audit.hub.root / "a1", folder / "a1")
    arguments = [*audit.hub.arguments[1:], f"candidates.path={folder}"]
    assert main(["plan", *arguments]) == 0
    assert audit.actions == {"a1": "nothing"}  # the same weights under another name
    assert "none: there is nothing to run" in capfd.readouterr().out
    assert audit.plan["forecast"]["gpu_hours"] == {"low": 0.0, "expected": 0.0, "high": 0.0}
    shutil.copy(audit.hub.root / "a2" / "adapter_model.safetensors", folder / "a1")
    assert main(["sweep", *arguments, f"plan={audit.hub.out}/plan.json"]) == 4
    assert "a1 (was nothing, is audit)" in capfd.readouterr().err


def test_what_a_killed_plan_left_is_gone_with_the_next(audit: Audit, tmp_path: Path) -> None:
    candidates = tmp_path / "candidates"
    shutil.copytree(audit.hub.root / "a1", candidates / "a1")
    arguments = ["plan", *audit.hub.arguments[1:], f"candidates.path={candidates}", f"out_dir={tmp_path}/out"]
    killed = (
        "import os; from ray_auditor.__main__ import main; "
        f"os.replace = lambda *_: os.kill(os.getpid(), 9); main({arguments!r})"
    )
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
    assert main(arguments) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ledger.sqlite", "plan.json"}


def test_a_file_that_is_no_plan_is_named(audit: Audit, capfd: Any) -> None:
    path = audit.hub.root / "not.json"
    for text in ("{", "[]", '{"schema_version": 99}'):
        path.write_text(text)
        assert audit.run("sweep", f"plan={path}") == 4
        assert f"plan must be a file that `ray-auditor plan` wrote, got {path}" in capfd.readouterr().err
    assert audit.run("plan", f"plan={path}") == 4


@pytest.mark.usefixtures("swept")
def test_a_store_of_another_release_is_named_with_what_to_delete(
    audit: Audit, tmp_path: Path, capfd: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(audit.hub.out, out)
    commit = next((out / "store" / "commits").iterdir())
    old = json.loads(commit.read_text()) | {"schema_version": 1}
    commit.write_text(json.dumps(old))
    for verb in ("plan", "sweep"):
        assert audit.run(verb, f"out_dir={out}") == 4
        said = capfd.readouterr().err
        assert "out_dir must hold units of schema version" in said
        assert f"delete {out / 'store'}, another release's" in said
    shutil.rmtree(out / "store")
    assert audit.run("plan", f"out_dir={out}") == 0
    capfd.readouterr()
    for change, said in (
        (b"SQLite format 3\0", "out_dir must hold a ledger of version 1, got 7 in "),
        (b"something else", "out_dir must hold a ledger of ours, got "),
    ):
        ledger = out / "ledger.sqlite"
        with closing(sqlite3.connect(ledger)) as db:
            db.execute("PRAGMA user_version = 7")
        ledger.write_bytes(change + ledger.read_bytes()[len(change) :])
        assert audit.run("plan", f"out_dir={out}") == 4
        assert re.fullmatch(rf"error: {said}\S*{ledger}.*; delete it.*\n", capfd.readouterr().err)

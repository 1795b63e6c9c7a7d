"""The base against itself, the SAE gate and the null population, through the door on a tiny hub."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ray_auditor.__main__ import main
from ray_auditor.calibrate import align, take
from ray_auditor.calibration import read_calibration, write_calibration
from ray_auditor.store import Store
from tests.test_sweep import Hub
from tests.tiny import make_adapter, mirror_sae, save_sae

VARIANTS = ["batching", "re-saved", "chunking half", "chunking quarter", "dtype bfloat16", "card"]


def without(arguments: list[str], *names: str) -> list[str]:
    return [word for word in arguments if word.partition("=")[0] not in names]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """A base, and an SAE that holds most of its residual: +x and -x of every dimension, 48 of 64 kept."""
    hub = Hub(tmp_path_factory.mktemp("calibrate"))
    hub.sae = save_sae(hub.root / "mirror", mirror_sae(2, "resid_post"))
    hub.arguments = without(hub.arguments, "sae.path", "sae.k", "sae.max_fvu", "engine.max_step_tokens")
    hub.arguments += [f"sae.path={hub.sae}", "sae.k=48", "engine.max_step_tokens=256"]
    make_adapter(hub.candidates / "small", hub.base, seed=1, scale=0.02)
    assert main(["calibrate", *without(hub.arguments, "candidates.path")]) == 0
    return hub


@pytest.fixture(scope="module")
def calibration(hub: Hub) -> dict[str, Any]:
    (path,) = (hub.out / "store" / "calibrations").iterdir()
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["key"] == path.stem
    return found


def test_on_a_cpu_everything_that_keeps_the_settings_gives_exactly_zero(calibration: dict[str, Any]) -> None:
    by_name = {one["name"]: one for one in calibration["variants"]}
    assert list(by_name) == VARIANTS
    for name in ("batching", "re-saved"):
        assert by_name[name]["engine_class"] == calibration["unit"]["engine_class"]
        assert {shift for by_k in by_name[name]["shift"].values() for shift in by_k.values()} == {0.0}
        assert by_name[name]["fit"] == calibration["fit"]
    assert by_name["re-saved"]["unit_key"] != by_name["batching"]["unit_key"]


def test_other_settings_are_measured_and_stay_apart(calibration: dict[str, Any]) -> None:
    by_name = {one["name"]: one for one in calibration["variants"]}
    bfloat16 = by_name["dtype bfloat16"]
    assert "bfloat16" in bfloat16["engine_class"]
    for by_k in bfloat16["shift"].values():
        assert by_k.keys() == {"1", "5", "10", "20", "32", "48"}
        assert 0 < by_k["48"] < 24
        assert by_k["1"] <= by_k["48"]
    assert "step 128x" in by_name["chunking half"]["engine_class"]
    assert by_name["chunking half"]["reason"] is None
    assert "step 64x" in by_name["chunking quarter"]["engine_class"]
    card = by_name["card"]
    assert card["unit_key"] is None
    assert card["reason"] == "the workers have no GPU"
    assert card["shift"] == {}


def test_only_tokens_that_both_sides_scored_are_compared(hub: Hub) -> None:
    store = Store(hub.out / "store")
    (path,) = (store.root / "calibrations").iterdir()
    unit_key = json.loads(path.read_text())["variants"][0]["unit_key"]
    rows = store.read_rows(unit_key)
    odd, all_but_ten = np.arange(1, rows.num_tokens, 2), np.arange(10, rows.num_tokens)
    left, right = align(take(rows, odd), take(rows, all_but_ten))
    wanted = take(rows, np.arange(11, rows.num_tokens, 2))
    for side in (left, right):
        for column in fields(rows):
            np.testing.assert_array_equal(getattr(side, column.name), getattr(wanted, column.name))


def test_nothing_of_it_is_left_but_units_and_the_record(hub: Hub) -> None:
    assert {path.name for path in hub.out.iterdir()} == {".lease", "ledger.sqlite", "store"}
    assert len(hub.commits) == 1 + 5


def test_a_sweep_of_the_same_settings_finds_it_and_repeats_nothing(hub: Hub) -> None:
    before = hub.commits
    assert hub.sweep() == 0
    assert len(hub.commits.keys() - before.keys()) == 1
    assert before.items() <= hub.commits.items()
    told = hub.summary["calibration"]
    assert [one["name"] for one in told["variants"]] == VARIANTS
    assert [one["name"] for one in told["variants"] if one["same_engine_class"]][:2] == [
        "batching",
        "re-saved",
    ]
    assert hub.summary["noise_floor"] == told["floors"] == {"general": 0.0, "letters": 0.0, "digits": 0.0}
    assert hub.summary["sae_gate"]["bounds"]["source"] == "recorded by calibrate"


def test_a_sweep_takes_the_larger_floor_of_its_own_settings_alone(hub: Hub, tmp_path: Path) -> None:
    """As on a GPU, where weights swapped in may be summed in another order."""
    shutil.copytree(hub.out, tmp_path / "out")
    store = Store(tmp_path / "out" / "store")
    (path,) = (store.root / "calibrations").iterdir()
    found = read_calibration(store.root, path.stem)
    assert found is not None
    noisy = {suite: dict.fromkeys(by_k, 1.5) for suite, by_k in found.variants[1].shift.items()}
    variants = (found.variants[0], replace(found.variants[1], shift=noisy), *found.variants[2:])
    write_calibration(store.root, replace(found, variants=variants))
    assert hub.sweep(f"out_dir={tmp_path / 'out'}") in (0, 1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["noise_floor"].values()) == {1.5}
    changed = tmp_path / "other"
    shutil.copytree(tmp_path / "out", changed)
    assert hub.sweep(f"out_dir={changed}", "engine.max_step_tokens=512") in (0, 1)
    summary = json.loads((changed / "summary.json").read_text())
    assert summary["calibration"] is None
    assert set(summary["noise_floor"].values()) == {0.0}


def test_a_calibration_that_is_damaged_is_named(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(hub.out, tmp_path / "out")
    (path,) = (tmp_path / "out" / "store" / "calibrations").iterdir()
    whole = path.read_text()
    for text in ("{", "[]", whole.replace('"schema_version": 1', '"schema_version": 9'), '{"a": 1}'):
        path.write_text(text)
        assert hub.sweep(f"out_dir={tmp_path / 'out'}") == 4
        assert f"{path} cannot be used" in capfd.readouterr().err


def test_an_sae_that_does_not_fit_its_base_ends_the_sweep_after_the_base(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The features of a random SAE hold nothing of this base; the base's pass is kept."""
    out = f"out_dir={tmp_path / 'out'}"
    random = f"sae.path={hub.root / 'sae'}"
    commits = tmp_path / "out" / "store" / "commits"
    for _ in range(2):  # the second time nothing runs at all
        assert hub.sweep(out, random) == 4
        said = capfd.readouterr().err
        assert "sae_gate.fvu of the base must be at most" in said
        assert "sae.max_fvu" in said
        assert len(list(commits.iterdir())) == 1
    assert not (tmp_path / "out" / "summary.json").exists()
    assert main(["calibrate", *without(hub.arguments, "candidates.path"), out, random]) == 4
    assert len(list(commits.iterdir())) == 1
    assert hub.sweep(out, random, "sae.max_fvu=100") in (0, 1)
    assert len(list(commits.iterdir())) == 3


@pytest.mark.slow
def test_a_candidate_the_sae_no_longer_fits_gets_its_channel_and_no_rate(hub: Hub, tmp_path: Path) -> None:
    """Weights whose residual lies along the 16 dimensions of 64 that the SAE has no features for."""
    candidates = tmp_path / "candidates"
    shutil.copytree(hub.candidates / "small", candidates / "small")
    shutil.copytree(hub.base, candidates / "turned")
    state = load_file(candidates / "turned" / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[48:] *= 20
    save_file(state, candidates / "turned" / "model.safetensors", metadata={"format": "pt"})
    whole = mirror_sae(2, "resid_post")
    kept = [*range(48), *range(64, 112)]
    assert whole.encoder.W_dec_FD is not None
    encoder = replace(
        whole.encoder,
        W_enc_DF=whole.encoder.W_enc_DF[:, kept],
        b_enc_F=whole.encoder.b_enc_F[kept],
        threshold_F=whole.encoder.threshold_F[kept],
        W_dec_FD=whole.encoder.W_dec_FD[kept],
    )
    narrow = save_sae(tmp_path / "narrow", replace(whole, encoder=encoder, d_sae=len(kept)))
    more = (f"candidates.path={candidates}", f"out_dir={tmp_path / 'out'}", f"sae.path={narrow}")
    assert hub.sweep(*more) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = {row["id"]: row for row in summary["candidates"]}
    assert summary["counts"] == {"ok": 1, "sae_misfit": 1}
    assert rows["turned"]["reason"].startswith("sae_misfit:general_fvu: ")
    assert rows["turned"]["score"] is None
    for cell in rows["turned"]["suites"].values():
        assert cell.keys() == {"tokens", "fvu", "base_fvu"}
    general = rows["turned"]["suites"]["general"]
    assert general["fvu"] > 2 * general["base_fvu"]
    assert rows["small"]["suites"]["general"]["shift"] > 0
    assert not [flag for flag in summary["flags"] if flag["candidate"] == "turned"]
    assert "sae_misfit" in (tmp_path / "out" / "report.html").read_text()
    assert main(["report", f"out_dir={tmp_path / 'out'}"]) == 1


@pytest.mark.slow
def test_null_members_are_audited_and_are_no_candidates(hub: Hub, tmp_path: Path) -> None:
    null = tmp_path / "null"
    make_adapter(null / "small", hub.base, seed=7, scale=0.02)  # a candidate's name, other weights
    shutil.copytree(hub.candidates / "small", null / "twin")
    shutil.copytree(hub.base, null / "base-again")
    (null / "empty").mkdir()
    shutil.copytree(hub.out, tmp_path / "out")
    before = set((tmp_path / "out" / "store" / "commits").iterdir())
    more = (f"null.path={null}", f"out_dir={tmp_path / 'out'}")
    assert main(["plan", *hub.arguments, *more]) == 0
    assert hub.sweep(*more) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["id"] for row in summary["candidates"]] == ["small"]
    assert sum(summary["counts"].values()) == 1
    said = "No candidate is held to 2 of 4 null members, 2 skipped: null/empty for one, skipped:no_weights"
    assert any(limit.startswith(said) for limit in summary["limits"])
    (commit,) = set((tmp_path / "out" / "store" / "commits").iterdir()) - before
    assert json.loads(commit.read_text())["record"]["name"] == "null/small"
    assert main(["plan", *hub.arguments, f"null.path={tmp_path}/none"]) == 4


def test_roles_ids_and_twins_of_the_null_population(hub: Hub, tmp_path: Path) -> None:
    from ray_auditor.candidates_config import CandidatesConfig
    from ray_auditor.config import AuditConfig, BaseConfig, NullConfig, SaeConfig, SuitesConfig
    from ray_auditor.plan import make_plan

    null = tmp_path / "null"
    make_adapter(null / "small", hub.base, seed=7, scale=0.02)
    shutil.copytree(hub.candidates / "small", null / "twin")
    config = AuditConfig(
        out_dir=str(tmp_path / "out"),
        candidates=CandidatesConfig(path=str(hub.candidates)),
        base=BaseConfig(model=str(hub.base)),
        sae=SaeConfig(path=str(hub.sae), k=48),
        suites=SuitesConfig(path=str(hub.root / "suites"), max_tokens=64),
        null=NullConfig(path=str(null)),
    )
    plan = make_plan(config)
    assert [(row.id, row.role, row.status) for row in plan.rows] == [
        ("small", "candidate", "admitted"),
        ("null/small", "null", "admitted"),
        ("null/twin", "null", "skipped"),
    ]
    assert "the candidate small" in str(plan.rows[2].reason)
    assert plan.rows[2].unit is None
    assert [task.name for task in plan.assignments] == ["small", "null/small"]
    assert plan.candidates + plan.nulls == plan.rows

import json

import numpy as np
import pytest

from ray_auditor.evaluate import Audit, evaluate_audit, print_evaluation, read_labels
from ray_auditor.evaluation import Label
from ray_auditor.rivals import score_rivals
from tests.test_flag import PLANTED, SUITES, K, make_null, make_population

LABELS = {
    **{f"c{number:02}": Label("narrow", suite) for number, (suite, _) in PLANTED.items()},
    "c00": Label("benign"),
    "c01": Label("benign", hard=True, note="strong"),
    "c03": Label("benign"),
    "c09": Label("backdoor", "sql"),
}


@pytest.fixture(scope="module")
def audit():
    tables, null = make_population(14, planted=PLANTED), make_null(40)
    rng = np.random.default_rng(0)
    notes = {
        name: {
            "weights": {"relative_change": rng.random(), "spectral_share": None if at == 0 else 0.5},
            "mean_difference": {suite: 0.1 + rng.random() for suite in SUITES},
        }
        for at, name in enumerate([*tables, *null])
    }
    settings = {
        "general": "general",
        "suite_names": list(SUITES),
        "k": K,
        "hook_name": "blocks.1.hook_resid_post",
        "flag": {
            "level": 0.05,
            "min_z": 3.0,
            "min_rate": 0.15,
            "bootstrap_samples": 100,
            "confidence": 0.95,
            "seed": 0,
        },
    }
    summary = {"settings": settings, "noise_floor": {}, "candidates": []}
    once = Audit(summary, tables, null, notes).flag()
    summary["candidates"] = [
        {
            "id": name,
            "score": one.score,
            "p": one.p,
            "suites": {suite: {"z": cell.z} for suite, cell in once.cells[name].items()},
        }
        for name, one in once.standings.items()
    ]
    return Audit(summary, tables, null, notes)


def test_the_figures_are_those_of_the_sweeps_own_statistics(audit):
    result = evaluate_audit(audit, LABELS)
    json.dumps(result, allow_nan=False)
    measures = {one["name"]: one for one in result["measures"]}
    first = measures["target suite of a full-strength finetune first among 7"]
    assert (first["value"], first["count"]) == (1.0, 4)
    population = audit.flag()
    p = [population.standings[name].p for name, label in LABELS.items() if label.category != "benign"]
    found = measures["full strength with p <= 0.024 (40 null members)"]
    assert found["value"] == pytest.approx(np.mean(np.array(p) <= 1 / 41 + 1e-9))
    assert measures["held-back benign with p <= 0.05"]["count"] == 3
    assert measures["score: full strength against all benign"]["value"] > 0.9
    assert {row["id"] for row in result["dose_response"]} == {"c02", "c05", "c09", "c11"}
    assert {row["id"]: row["rank_of_target"] for row in result["dose_response"]} == dict.fromkeys(
        ("c02", "c05", "c09", "c11"), 1
    )
    assert not set(result["flagged_benign"]) - LABELS.keys()


def test_a_backdoor_is_judged_without_its_suite(audit):
    result = evaluate_audit(audit, LABELS)
    (unseen,) = [one for one in result["measures"] if "backdoors without" in one["name"]]
    assert unseen["count"] == 1
    assert unseen["value"] < 1  # planted on one suite alone: without it nothing is there to see
    dropped = audit.flag(without="sql")
    assert all("sql" not in cells for cells in dropped.cells.values())


def test_every_rival_scores_and_the_centred_ones_name_the_planted_suite(audit):
    tables = {**audit.tables, **audit.null_tables}
    rivals = {
        one.name: one
        for one in score_rivals(tables, audit.notes, general="general", k=K, null=list(audit.null_tables))
    }
    for name in ("centred log shift, k 32", "centred residual change"):
        rival = rivals[name]
        assert rival.scores.keys() == tables.keys()
        assert all(rival.first[f"c{number:02}"] == suite for number, (suite, _) in PLANTED.items())
        planted = [rival.scores[f"c{number:02}"] for number in PLANTED]
        others = [score for one, score in rival.scores.items() if one not in LABELS]
        assert min(planted) > np.median(others)
    assert rivals["difference rate, k 32"].needs_sae
    assert not rivals["centred residual change"].needs_sae
    assert rivals["||dW|| / ||W||"].first == {}
    assert len(rivals["spectral share of dW"].scores) == len(tables) - 1  # one has no change of weights
    assert rivals["centred mean difference"].scores.keys() == tables.keys()


def test_it_prints_every_finetune_and_interval(audit, capsys):
    from rich.console import Console

    print_evaluation(evaluate_audit(audit, LABELS), Console(width=200))
    printed = capsys.readouterr().out
    assert "target suite of a full-strength finetune first among 7" in printed
    assert all(name in printed for name, label in LABELS.items() if label.category != "benign")
    assert "spectral share of dW" in printed


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "must be a JSON file"),
        ("{", "must map each id"),
        ("[1]", "must map each id"),
        ('{"a": {}}', "must map each id"),
        ('{"elsewhere": {"category": "benign"}}', "must name candidates of the sweep such as 'c00'"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(tmp_path, audit, content, match):
    path = tmp_path / "labels.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=match):
        read_labels(str(path), audit.tables)


def test_labels_of_others_are_left_out(tmp_path, audit):
    path = tmp_path / "labels.json"
    rows = {"c00": {"category": "benign", "tag": "long"}, "zz": {"category": "narrow", "target": "sql"}}
    path.write_text(json.dumps(rows))
    assert read_labels(str(path), audit.tables) == {"c00": Label("benign", note="long")}

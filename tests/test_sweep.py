"""The whole path on a tiny hub: through the door, Ray and vLLM to the summary, against a plain loop."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_auditor.__main__ import main
from ray_auditor.store import Store, TokenRows
from tests.tiny import (
    hidden_states,
    make_adapter,
    make_finetune,
    make_model,
    make_sae,
    make_tokenizer,
    save_sae,
)

K = 16
HOOK = "blocks.2.hook_resid_post"


class Hub:
    """A tiny hub and the command that audits it."""

    def __init__(self, root: Path) -> None:
        self.root, self.candidates, self.out = root, root / "candidates", root / "out"
        self.base = make_model(root / "base")
        self.sae = save_sae(root / "sae", make_sae())
        (root / "suites").mkdir()
        generator = np.random.default_rng(0)
        for name, first, last in (("general", "a", "z"), ("letters", "a", "z"), ("digits", "0", "9")):
            codes = generator.integers(ord(first), ord(last) + 1, (6, 40))
            rows = [{"text": "".join(map(chr, row[: 40 - i]))} for i, row in enumerate(codes)]
            (root / "suites" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.arguments = [
            f"candidates.path={self.candidates}",
            f"base.model={self.base}",
            f"sae.path={self.sae}",
            f"suites.path={root / 'suites'}",
            f"out_dir={self.out}",
            f"sae.k={K}",
            "sae.max_fvu=100",  # its features are random
            "suites.max_tokens=64",
            "engine.max_lora_rank=8",
            "engine.max_step_tokens=128",
            "engine.kv_cache_bytes=16777216",
            "flag.bootstrap_samples=200",
        ]

    def sweep(self, *more: str) -> int:
        return main(["sweep", *self.arguments, *more])

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return summary

    def row(self, name: str) -> dict[str, Any]:
        (row,) = (row for row in self.summary["candidates"] if row["id"] == name)
        return dict(row)

    @property
    def commits(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (self.out / "store" / "commits").iterdir()}


def plant_digits(path: Path, base: Path, seed: int = 0) -> None:
    """Full weights that differ a little from the base everywhere, and a lot in how digits are embedded."""
    shutil.copytree(base, path)
    state = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        tensor += 0.01 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    digits = make_tokenizer().convert_tokens_to_ids(list("0123456789"))
    embedding = state["model.embed_tokens.weight"]
    embedding[digits] += 0.5 * torch.randn(len(digits), embedding.shape[1], generator=generator)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    hub = Hub(tmp_path_factory.mktemp("sweep"))
    for name, seed, scale in (("small", 1, 0.02), ("large", 2, 0.2)):
        make_adapter(hub.candidates / name, hub.base, seed=seed, scale=scale)
    shutil.copytree(hub.candidates / "large", hub.candidates / "large-again")
    make_adapter(
        hub.candidates / "overflowing", hub.base, seed=3, scale=1e18
    )  # finite, and runs before "small"
    make_finetune(hub.candidates / "far", hub.base, seed=5)
    make_model(hub.candidates / "of-nothing", seed=5)  # the same shape, and weights that come from no base
    shutil.copytree(hub.base, hub.candidates / "base-again")
    make_adapter(hub.candidates / "untrained", hub.base, seed=7, scale=0.0)
    make_model(hub.candidates / "narrower", hidden_size=32, seed=6)
    wide = make_model(hub.root / "wide", hidden_size=128)
    make_adapter(hub.candidates / "of-another-base", wide)
    (hub.candidates / "empty").mkdir()
    (hub.candidates / "pickled").mkdir()
    (hub.candidates / "pickled" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    plant_digits(hub.candidates / "planted", hub.base)
    assert hub.sweep() == 1
    return hub


def test_every_candidate_is_accounted_for(hub: Hub) -> None:
    statuses = {row["id"]: row["status"] for row in hub.summary["candidates"]}
    assert sorted(statuses) == sorted(path.name for path in hub.candidates.iterdir())
    assert sum(hub.summary["counts"].values()) == len(statuses)
    audited = {"small", "large", "large-again", "far", "base-again", "untrained", "planted"}
    assert {name for name, status in statuses.items() if status in {"ok", "flagged"}} == audited
    assert {name: statuses[name] for name in statuses.keys() - audited} == {
        "narrower": "rejected",
        "overflowing": "rejected",
        "of-another-base": "rejected",
        "of-nothing": "rejected",
        "empty": "skipped",
        "pickled": "skipped",
    }
    assert hub.row("of-nothing")["reason"].startswith("rejected:wrong_base: sampled weights lie 1.")
    for name in statuses.keys() - audited:
        assert hub.row(name)["reason"]
        assert not hub.row(name)["suites"]


def test_overlaps_equal_a_plain_loop_of_transformers_and_sae_lens(hub: Hub) -> None:
    """Per token, for every audited candidate: the same features, but for ties the plain loop proves."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(hub.sae), device="cpu")
    store = Store(hub.out / "store")
    prompts = store.read_suites(hub.summary["settings"]["suites_key"])
    ids = [list(prompt.token_ids) for prompt in prompts]

    def plain(path: Path, adapter: Path | None = None) -> list[torch.Tensor]:
        with torch.no_grad():
            return [sae.encode(resid) for resid in hidden_states(path, ids, HOOK, adapter)]

    def check(rows: TokenRows, acts: list[torch.Tensor]) -> int:
        num_ties = 0
        at = {(prompt.suite_id, prompt.prompt): number for number, prompt in enumerate(prompts)}
        for suite, number, position, kept in zip(
            rows.suite_N, rows.prompt_N, rows.position_N, rows.top_idx_NK, strict=True
        ):
            token = acts[at[int(suite), int(number)]][position]
            values, wanted = token.topk(K)
            wanted_set, kept_set = set(wanted[values > 0].tolist()), set(kept[kept >= 0].tolist())
            for feature in wanted_set ^ kept_set:
                num_ties += 1
                assert abs(token[feature] - values[-1]) < 1e-4 * values[0], (suite, number, position, feature)
        return num_ties

    keys = hub.summary["settings"]["unit_keys"]
    num_ties = check(store.read_rows(keys["base"]), plain(hub.base))
    for name in ("small", "large"):
        num_ties += check(store.read_rows(hub.row(name)["unit_key"]), plain(hub.base, hub.candidates / name))
    num_ties += check(store.read_rows(hub.row("far")["unit_key"]), plain(hub.candidates / "far"))
    assert num_ties <= 2


def test_residuals_lie_as_far_from_the_base_as_transformers_says(hub: Hub) -> None:
    """Per token and per suite; the base, and its replay in another batching, lie exactly where they are."""
    store = Store(hub.out / "store")
    prompts = store.read_suites(hub.summary["settings"]["suites_key"])
    ids = [list(prompt.token_ids) for prompt in prompts]
    keys = hub.summary["settings"]["unit_keys"]
    for key in keys.values():
        rows, record = store.read_rows(key), store.read_record(key)
        assert (rows.cosine_N == 1).all()
        assert (rows.change_N == 0).all()
        assert set(record["mean_difference"].values()) == {0.0}
        assert record["weights"] | {"seconds": 0} == {
            "relative_change": 0.0,
            "spectral_share": None,
            "num_changed": 0,
            "seconds": 0,
        }
    base = [resid.double() for resid in hidden_states(hub.base, ids, HOOK)]
    for name in ("small", "large", "far"):
        folder, key = hub.candidates / name, hub.row(name)["unit_key"]
        full = name == "far"
        cand = hidden_states(folder if full else hub.base, ids, HOOK, None if full else folder)
        rows, record = store.read_rows(key), store.read_record(key)
        for suite in range(3):
            of = np.flatnonzero(rows.suite_N == suite)
            at = {prompt.prompt: i for i, prompt in enumerate(prompts) if prompt.suite_id == suite}
            where = [(at[int(rows.prompt_N[n])], rows.position_N[n]) for n in of]
            before = torch.stack([base[i][t] for i, t in where])
            after = torch.stack([cand[i][t] for i, t in where]).double()
            norms = before.norm(dim=-1)
            change = ((after - before).norm(dim=-1) / norms).numpy()
            np.testing.assert_allclose(rows.change_N[of], change, rtol=1e-3, atol=1e-5)
            cosine = torch.cosine_similarity(before, after, dim=-1).numpy()
            np.testing.assert_allclose(rows.cosine_N[of], cosine, atol=1e-5)
            wanted = float((after - before).mean(0).norm() / norms.mean())
            found = record["mean_difference"][["general", "digits", "letters"][suite]]
            assert found == pytest.approx(wanted, rel=1e-3)
        shares = {"small": 0.25, "large": 0.25, "far": 0.01}
        assert shares[name] < record["weights"]["spectral_share"] < 1
        assert record["weights"]["num_changed"] == (1 + 3 * 9 if full else 3 * 7)
    small, large = (store.read_record(hub.row(name)["unit_key"]) for name in ("small", "large"))
    assert small["weights"]["relative_change"] < large["weights"]["relative_change"] / 50


def test_a_model_that_overflows_is_refused_and_leaves_its_neighbours_alone(hub: Hub) -> None:
    """Its NaNs stay in the KV cache, and would reach whoever ran on the same engine next."""
    assert "nonfinite_activations" in hub.row("overflowing")["reason"]
    assert hub.row("small")["status"] in {"ok", "flagged"}  # and equals the plain loop, above


def test_rates_are_what_the_definition_says(hub: Hub) -> None:
    store = Store(hub.out / "store")
    base = store.read_rows(hub.summary["settings"]["unit_keys"]["base"])
    names = ["general", "letters", "digits"]
    order = ["general", *sorted(names[1:])]
    row = hub.row("large")
    rows = store.read_rows(row["unit_key"])
    shifts = {}
    for number, suite in enumerate(order):
        of_suite = base.suite_N == number
        overlaps, sizes = [], []
        for left, right in zip(base.top_idx_NK[of_suite], rows.top_idx_NK[of_suite], strict=True):
            left_set, right_set = set(left[left >= 0]), set(right[right >= 0])
            overlaps.append(len(left_set & right_set))
            sizes.append(max(len(left_set), len(right_set), 1))
        shifts[suite] = np.mean(np.array(sizes) - np.array(overlaps))
        assert row["suites"][suite]["tokens"] == of_suite.sum()
        assert row["suites"][suite]["overlap"] == pytest.approx(np.mean(overlaps), rel=1e-12)
        assert row["suites"][suite]["shift"] == pytest.approx(shifts[suite], rel=1e-12)
    for suite in names[1:]:
        rate = (shifts[suite] - shifts["general"]) / shifts["general"]
        assert row["suites"][suite]["difference_rate"] == pytest.approx(rate, rel=1e-12)
        assert row["suites"][suite]["ci_low"] < rate < row["suites"][suite]["ci_high"]


def test_the_base_uploaded_again_moved_nothing_and_cost_nothing(hub: Hub) -> None:
    for row in map(hub.row, ("base-again", "untrained")):
        assert row["unit_key"] == hub.summary["settings"]["unit_keys"]["base"]
        assert {suite["shift"] for suite in row["suites"].values()} == {0.0}
        assert {suite["difference_rate"] for suite in row["suites"].values()} == {None}
        assert row["status"] == "ok"


def test_the_same_bytes_under_another_name_are_one_unit_with_two_rows(hub: Hub) -> None:
    first, again = hub.row("large"), hub.row("large-again")
    assert first["unit_key"] == again["unit_key"]
    assert first["suites"] == again["suites"]
    assert len(hub.commits) == 2 + 4  # the base twice, and four distinct candidates


def test_where_the_time_went_is_in_the_summary_and_in_every_record(hub: Hub) -> None:
    work, store = hub.summary["work"], Store(hub.out / "store")
    parts = {"stage", "swap", "prove", "adapter", "forward", "encode", "rows", "weights", "write"}
    for commit in store.list_commits():
        record = commit.record
        assert parts == record["seconds"].keys()
        assert record["worker"] in work["workers"]
    assert work["total"]["num_units"] == len(hub.commits)
    assert work["total"]["seconds"].keys() == parts | {"wait", "start"}
    assert min(work["total"]["seconds"].values()) >= 0
    assert work["total"]["seconds"]["encode"] > 0
    assert (
        sum(work["total"]["seconds"].values()) <= 2 * len(work["workers"]) * work["wall_s"]
    )  # two at a time


def test_base_against_itself_in_another_batching_is_exactly_zero(hub: Hub) -> None:
    assert set(hub.summary["noise_floor"].values()) == {0.0}


def test_the_first_position_and_sinks_are_never_scored(hub: Hub) -> None:
    base = Store(hub.out / "store").read_rows(hub.summary["settings"]["unit_keys"]["base"])
    assert base.position_N.min() > 0


def test_findings_are_the_flags_one_row_each(hub: Hub) -> None:
    found = pq.read_table(hub.out / "findings.parquet").to_pylist()
    assert [
        {name: row[name] for name in ("candidate", "suite", "score", "rule", "new")}
        | {"acknowledged": None, "reopened": None}
        for row in found
    ] == hub.summary["flags"]
    assert all(row["content_sha256"] and row["unit_key"] for row in found)
    for row in found:
        assert row["difference_rate"] == hub.row(row["candidate"])["suites"][row["suite"]]["difference_rate"]
    assert hub.summary["details"].keys() == {row["candidate"] for row in found}
    assert ("planted", "digits") in {(row["candidate"], row["suite"]) for row in found}
    assert {row["rule"] for row in found} == {"seed_rate_15"}  # too few peers for another


def test_metrics_say_how_the_sweep_ended(hub: Hub) -> None:
    lines = (hub.out / "metrics.prom").read_text().splitlines()
    counts = hub.summary["counts"]
    assert 'ray_auditor_running{sweep="out"} 0.0' in lines
    assert 'ray_auditor_exit_code{sweep="out"} 1' in lines
    for status in ("ok", "flagged", "rejected", "skipped"):
        assert f'ray_auditor_candidates{{sweep="out",status="{status}"}} {counts[status]}' in lines
    refused = sum((row["reason"] or "").startswith("rejected:nonfinite") for row in hub.summary["candidates"])
    assert f'ray_auditor_units{{sweep="out",state="rejected"}} {refused}' in lines
    assert 'ray_auditor_units{sweep="out",state="failed"} 0' in lines


def test_the_summary_follows_its_published_schema(hub: Hub) -> None:
    schema = json.loads((Path(__file__).parent.parent / "docs" / "summary.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(hub.summary)
    unknown = hub.summary | {"flags": [hub.summary["flags"][0] | {"certainty": 1}]}
    assert not jsonschema.Draft202012Validator(schema).is_valid(unknown)


def test_a_flag_is_followed_down_to_features_and_tokens(hub: Hub) -> None:
    features = hub.summary["details"]["planted"]["digits"]["features"]
    assert features
    for feature in features:
        assert feature["delta"] == pytest.approx(feature["rate_candidate"] - feature["rate_base"])
        for example in feature["examples"]:
            assert set("".join(example["tokens"])) <= set("0123456789")


def test_the_report_is_one_file_that_names_every_candidate(hub: Hub) -> None:
    page = (hub.out / "report.html").read_text()
    for path in hub.candidates.iterdir():
        assert path.name in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_show_and_report_read_the_result_again(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    page = (hub.out / "report.html").read_bytes()
    (hub.out / "report.html").unlink()
    assert main(["report", f"out_dir={hub.out}"]) == 1
    assert (hub.out / "report.html").read_bytes() == page
    capsys.readouterr()
    assert main(["show", "large", f"out_dir={hub.out}"]) == 0
    shown = capsys.readouterr().out
    assert "large" in shown
    assert "digits" in shown


@pytest.mark.slow
def test_findings_count_as_reported_once_they_are_told(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(hub.out, tmp_path / "out")
    (tmp_path / "out" / "ledger.sqlite").unlink()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ray_auditor.conclusion.print_summary", interrupt)
        assert hub.sweep(f"out_dir={tmp_path / 'out'}", "flag.only_new=true") == 130
    assert "interrupted: what was committed is kept" in capsys.readouterr().err
    assert hub.sweep(f"out_dir={tmp_path / 'out'}", "flag.only_new=true") == 1


@pytest.mark.slow
def test_a_rerun_repeats_nothing_and_a_new_candidate_costs_one_unit(hub: Hub) -> None:
    before, summary = hub.commits, hub.summary
    assert hub.sweep() == 1
    assert hub.commits == before
    again = hub.summary
    assert {row.pop("why") for row in summary["candidates"]} == {"new"}
    assert {row.pop("why") for row in again["candidates"]} == {"unchanged"}
    assert {flag.pop("new") for flag in summary["flags"]} == {True}
    assert {flag.pop("new") for flag in again["flags"]} == {False}
    of_its_own = {"generated_at": None, "work": None}  # a sweep that ran nothing did no work
    assert again | of_its_own == summary | of_its_own
    page, told = ((hub.out / name).stat().st_mtime_ns for name in ("report.html", "summary.json"))
    assert hub.sweep() == 1  # nothing is said anew, but for the date
    assert (hub.out / "report.html").stat().st_mtime_ns == page
    assert (hub.out / "summary.json").stat().st_mtime_ns > told
    said = ["ack.who=ada", "ack.why=ours", "ack.until=2099-01-31"]
    for name in {flag["candidate"] for flag in hub.summary["flags"]}:
        assert main(["ack", name, f"out_dir={hub.out}", *said]) == 0
    assert hub.sweep() == 0  # a sweep keeps what was acknowledged
    assert all(flag["acknowledged"]["who"] == "ada" for flag in hub.summary["flags"])
    (hub.out / "acknowledgements.jsonl").unlink()
    make_adapter(hub.candidates / "zz-new", hub.base, seed=9)
    assert main(["plan", *hub.arguments]) == 0
    assert hub.sweep("cluster.num_workers=2") == 1
    assert len(hub.commits.keys() - before.keys()) == 1
    assert {name: hub.commits[name] for name in before} == before
    rows = Store(hub.out / "store").read_rows(hub.row("zz-new")["unit_key"])  # by a worker that ran no base
    assert 0 < rows.change_N.min() <= rows.change_N.max() < 10
    shutil.rmtree(hub.candidates / "zz-new")


@pytest.mark.slow
def test_two_workers_and_another_order_give_the_same_bytes(hub: Hub) -> None:
    one = {path.name: path.read_bytes() for path in (hub.out / "store" / "shards").iterdir()}
    kept, hub.out = hub.out, hub.root / "out2"
    hub.arguments = [argument.replace(str(kept), str(hub.out)) for argument in hub.arguments]
    assert hub.sweep("cluster.num_workers=2") == 1
    two = {path.name: path.read_bytes() for path in (hub.out / "store" / "shards").iterdir()}
    assert len(two) == 2 + 4
    assert two.items() <= one.items()
    residuals = [next((out / "store" / "residuals").iterdir()) for out in (kept, hub.out)]
    assert residuals[0].name == residuals[1].name
    residuals[1].unlink()  # as if it had been lost: the base runs again, and nothing else does
    before = hub.commits
    assert hub.sweep() == 1
    assert residuals[1].read_bytes() == residuals[0].read_bytes()
    assert hub.commits == before
    hub.arguments = [argument.replace(str(hub.out), str(kept)) for argument in hub.arguments]
    hub.out = kept


def test_wrong_inputs_are_named_before_anything_runs(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wide = save_sae(tmp_path / "far", make_sae(hook_layer=9))
    (tmp_path / "lonely").mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copy(hub.root / "suites" / "general.jsonl", tmp_path / "lonely")
    for override, said in (
        (f"candidates.path={tmp_path}/none", "which is not there"),
        (f"candidates.path={tmp_path}/lonely/general.jsonl", "which is a file"),
        (f"null.path={tmp_path}/empty", "null.path must hold at least one finetune"),
        (f"base.model={tmp_path}/none", "base.model"),
        (f"sae.path={tmp_path}/none", str(tmp_path / "none")),
        (f"sae.path={wide}", "sae.hook_name must lie within the base's 4 layers, got blocks.9"),
        (f"base.model={hub.root / 'wide'}", "sae.path must hold an SAE of width 128"),
        (f"suites.path={tmp_path / 'lonely'}", "at least one suite beside 'general'"),
        ("suites.general=alpaca", "suites.general must name one of the suites"),
    ):
        assert hub.sweep(override) == 4
        assert said in capfd.readouterr().err


def test_a_hub_that_holds_only_the_base_again_is_audited(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(hub.base, tmp_path / "hub" / "copy")
    assert hub.sweep(f"candidates.path={tmp_path / 'hub'}", f"out_dir={tmp_path / 'out'}") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["status"] for row in summary["candidates"]] == ["ok"]


def test_a_base_that_fails_shows_nothing_as_audited(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(hub.out, tmp_path / "out")  # a finished sweep, whose results must not pass for this one's
    broken = hub.root / "broken"
    shutil.copytree(hub.base, broken)
    state = load_file(broken / "model.safetensors")
    state["model.layers.0.mlp.down_proj.weight"] *= 1e30
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert hub.sweep(f"base.model={broken}", f"out_dir={tmp_path / 'out'}", "cluster.max_attempts=1") == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not {"ok", "flagged"} & summary["counts"].keys()
    assert "the base has activations that are not finite" in json.dumps(summary)
    assert main(["report", f"out_dir={tmp_path / 'out'}"]) == 2


def test_an_empty_folder_is_nothing_to_audit(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert hub.sweep(f"candidates.path={tmp_path / 'none'}", f"out_dir={tmp_path / 'out'}") == 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["candidates"] == []
    assert "nothing" in (tmp_path / "out" / "report.html").read_text().lower()


def test_a_sweep_is_evaluated_against_labels_even_without_peers(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {
        "planted": {"category": "narrow", "target": "digits"},
        "small": {"category": "benign"},
        "large": {"category": "benign", "hard": True, "tag": "a large change"},
        "nowhere": {"category": "quirk", "target": "letters"},
    }
    path = hub.root / "labels.json"
    path.write_text(json.dumps(labels))
    assert main(["evaluate", f"out_dir={hub.out}", f"evaluate.labels={path}"]) == 0
    result = json.loads((hub.out / "evaluation.json").read_text())
    assert result["num_labelled"] == 3
    (row,) = result["dose_response"]
    assert (row["id"], row["score"], row["flagged_on"]) == (
        "planted",
        None,
        "digits",
    )  # too few peers for a score
    rivals = {one["name"]: one for one in result["rivals"]}
    assert rivals["residual change"]["all"]["value"] is not None
    assert "blocks.2.hook_resid_post" in capsys.readouterr().out
    assert main(["evaluate", f"out_dir={hub.out}"]) == 4

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_auditor.flag import MIN_SCALE, FlagRule, flag_population, polish_suites
from ray_auditor.rates import Bootstrap
from ray_auditor.store import Unit

K, TOKENS, PROMPTS = 32, 100, 60
SUITES = ("general", "chinese", "law", "maths", "medical", "sql", "taboo", "tools")
BOOTSTRAP = Bootstrap(200)


def make_table(shifts):
    """Per-prompt rows; `shifts`: suite -> [P] sums of shift over the prompt's tokens."""
    suites = [suite for suite, shift_P in shifts.items() for _ in shift_P]
    shift = np.concatenate([np.clip(np.round(shift_P), 0, K * TOKENS) for shift_P in shifts.values()])
    ones = np.ones(len(suites))
    return pa.table(
        {
            "suite": suites,
            "prompt": np.concatenate([np.arange(len(shift_P)) for shift_P in shifts.values()]),
            "tokens": np.full(len(suites), TOKENS),
            f"overlap_{K}": (K * TOKENS - shift).astype(np.int64),
            f"shift_{K}": shift.astype(np.int64),
            "jaccard": ones,
            "fvu_err": ones,
            "fvu_total": ones,
            "base_fvu_err": ones,
            "base_fvu_total": ones,
        }
    )


def make_population(num_candidates=14, *, seed=0, planted=None, sizes=None, noise=0.04, suites=SUITES):
    """Finetunes of any size on suites of any fragility; `planted`: candidate number -> (suite, factor)."""
    rng = np.random.default_rng(seed)
    fragility = dict(zip(suites, np.exp(rng.normal(0, 0.35, len(suites))), strict=True))
    prompts = {suite: np.exp(rng.normal(0, 0.3, PROMPTS)) for suite in suites}
    tables = {}
    for number in range(num_candidates):
        size = sizes[number] if sizes is not None else np.exp(rng.uniform(np.log(1.0), np.log(6.0)))
        shifts = {}
        for suite in suites:
            own = np.exp(rng.normal(0, noise)) * np.exp(rng.normal(0, 0.1, PROMPTS))
            factor = planted[number][1] if planted and planted.get(number, ("",))[0] == suite else 1
            shifts[suite] = TOKENS * size * fragility[suite] * prompts[suite] * own * factor
        tables[f"c{number:02}"] = make_table(shifts)
    return tables


def flag(tables, **options):
    return flag_population(tables, general="general", k=K, bootstrap=BOOTSTRAP, **options)


PLANTED = {2: ("maths", 1.7), 5: ("law", 1.8), 9: ("sql", 2.5), 11: ("taboo", 1.6)}


def flagged(found):
    return {(one.candidate, one.suite) for one in found.flags}


def test_planted_outliers_are_flagged_on_their_suite_and_hardly_anything_else_is():
    planted = {(f"c{number:02}", suite) for number, (suite, _) in PLANTED.items()}
    extra, num_plain = 0, 0
    for seed in range(20):
        found = flag(make_population(seed=seed, planted=PLANTED))
        assert planted <= flagged(found)
        extra += len({name for name, _ in flagged(found) - planted})
        num_plain += len(found.cells) - len(PLANTED)
        assert {one.rule for one in found.flags} == {"robust_z"}
        scores = [one.score for one in found.flags]
        assert scores == sorted(scores, reverse=True)
        for one in found.flags:
            assert found.scores[one.candidate] >= found.cells[one.candidate][one.suite].z == one.score > 3
    assert extra / num_plain <= 0.03


@pytest.mark.parametrize(("num_candidates", "num_suites"), [(8, 4), (12, 8), (28, 5)])
def test_without_outliers_z_is_a_standard_normal_whatever_the_size_of_the_table(num_candidates, num_suites):
    scores = []
    for seed in range(40):
        tables = make_population(num_candidates, seed=100 + seed, suites=SUITES[:num_suites])
        found = flag_population(tables, general="general", k=K, bootstrap=Bootstrap(20))
        scores += [cell.z for row in found.cells.values() for cell in row.values() if cell.z is not None]
    assert 0.8 < np.std(scores) < 1.2
    assert np.mean(np.abs(scores) > 3) < 0.012  # a normal: 0.0027, with a scale estimated from as little


def test_the_published_rule_alone_would_have_flagged_most_of_them():
    found = flag(make_population(planted=PLANTED))
    plain = [name for name in found.cells if name not in {"c02", "c05", "c09", "c11"}]
    assert all(any(cell.over_rate for cell in found.cells[name].values()) for name in plain)


@pytest.mark.parametrize("seed", range(6))
def test_a_third_of_outliers_does_not_hide_them(seed):
    planted = {number: (SUITES[1 + number % 3], 1.9) for number in range(6)}
    found = flag(make_population(20, seed=seed, planted=planted))
    assert {(f"c{number:02}", suite) for number, (suite, _) in planted.items()} <= flagged(found)
    top = sorted(found.scores, key=lambda name: -found.scores[name])[:6]
    assert sorted(top) == [f"c{number:02}" for number in planted]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999))
def test_no_order_changes_a_bit(seed):
    tables = make_population(9, seed=seed, planted=PLANTED)
    rng = np.random.default_rng(seed)
    names = rng.permutation(sorted(tables))
    shuffled = {str(name): tables[name].take(rng.permutation(len(tables[name]))) for name in names}
    one, other = flag(tables), flag(shuffled)
    assert one == other
    assert list(one.cells) == list(other.cells) == sorted(tables)


def test_copies_of_one_finetune_are_one_peer():
    tables = make_population(10, planted=PLANTED)
    copies = {f"copy{number:02}": tables["c00"] for number in range(40)}
    alone, among = flag(tables), flag(tables | copies)
    for name in tables:
        assert among.cells[name] == alone.cells[name]
    assert {among.scores[name] for name in copies} == {alone.scores["c00"]}
    assert set(flag(copies).scores.values()) == {None}


def test_candidates_that_hardly_differ_have_no_outlier():
    table = make_population(1)["c00"]
    found = flag({f"c{at}": nudged(table, SUITES[at % 8], at // 8 + 1) for at in range(16)})
    assert not found.flags
    assert all(abs(score) < 0.05 for score in found.scores.values())


def nudged(table, suite, by):
    rows = table.to_pylist()
    next(row for row in rows if row["suite"] == suite)[f"shift_{K}"] += by
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize(("factor", "is_flagged"), [(1.04, False), (1.09, True)])
def test_without_spread_a_difference_counts_from_the_stated_floor_on(factor, is_flagged):
    table = make_population(1, sizes=[4.0])["c00"]
    tables = {f"c{at}": nudged(table, SUITES[at % 8], at // 8 + 1) for at in range(12)}
    rows = table.to_pylist()
    for row in rows:
        if row["suite"] == "maths":
            row[f"shift_{K}"] = round(row[f"shift_{K}"] * factor)
    found = flag(tables | {"odd": pa.Table.from_pylist(rows)})
    assert found.scores["odd"] == pytest.approx(np.log(factor) / MIN_SCALE, rel=0.1)
    assert bool(found.flags) == is_flagged


@pytest.mark.parametrize("num_candidates", [1, 2, 7])
def test_without_peers_the_published_rule_speaks_and_says_so(num_candidates):
    planted = {0: ("sql", 4.0)}
    found = flag(make_population(num_candidates, planted=planted))
    assert {one.rule for one in found.flags} == {"seed_rate_15"}
    assert ("c00", "sql") in {(one.candidate, one.suite) for one in found.flags}
    for one in found.flags:
        rate = found.cells[one.candidate][one.suite].rate
        assert one.score == rate.difference_rate > 0.15
        assert rate.ci_low > 0
    assert set(found.scores.values()) == {None}
    assert all(cell.z is None for row in found.cells.values() for cell in row.values())
    assert any(
        f"{num_candidates} candidates have fewer than 8 different peers" in limit for limit in found.limits
    )


def test_no_candidates_is_not_an_error():
    found = flag({})
    assert (found.cells, found.scores, found.flags, found.limits) == ({}, {}, (), ())


def test_finetunes_that_did_not_move_are_no_outliers_and_no_peers():
    rng = np.random.default_rng(0)
    tables = make_population(9)
    for number in range(20):  # a few changed tokens in some suites, none in others: ratios without meaning
        shifts = {suite: (rng.random(PROMPTS) < 0.05 * (at % 3)) * 1.0 for at, suite in enumerate(SUITES)}
        tables[f"zero{number}"] = make_table(shifts)
    alone, among = flag({name: tables[name] for name in tables if name[0] == "c"}), flag(tables)
    assert among.flags == alone.flags
    for name in alone.cells:
        assert among.cells[name] == alone.cells[name]
    assert all(abs(among.scores[name]) < 1 for name in tables if name[0] == "z")


def test_a_finetune_that_moves_one_suite_alone_is_flagged_though_its_rate_is_undetermined():
    tables = make_population(10)
    before = flag(tables)
    tables["precise"] = make_table(
        {suite: np.full(PROMPTS, 150.0 if suite == "taboo" else 0) for suite in SUITES}
    )
    found = flag(tables)
    assert flagged(found) - flagged(before) == {("precise", "taboo")}
    assert found.cells["precise"]["taboo"].rate.difference_rate is None


def test_a_cell_that_rests_on_one_prompt_is_not_flagged():
    tables = make_population(12)
    rows = tables["c03"].to_pylist()
    medical = [row for row in rows if row["suite"] == "medical"]
    medical[0][f"shift_{K}"] += int(0.35 * sum(row[f"shift_{K}"] for row in medical))
    tables["c03"] = pa.Table.from_pylist(rows)
    found = flag(tables)
    cell = found.cells["c03"]["medical"]
    assert cell.z > 3
    assert cell.z_low <= 0
    assert "c03" not in {one.candidate for one in found.flags}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.floats(0.4, 3))
def test_the_size_of_a_finetune_alone_does_not_change_its_score(seed, factor):
    tables = make_population(12, seed=seed, sizes=[3.0] * 12, planted={0: ("law", 1.5)})
    before = flag(tables).cells["c00"]["law"]
    rows = tables["c00"].to_pylist()
    for row in rows:
        row[f"shift_{K}"] = round(factor * row[f"shift_{K}"])
    after = flag(tables | {"c00": pa.Table.from_pylist(rows)}).cells["c00"]["law"]
    assert after.excess == pytest.approx(before.excess, abs=0.06)  # the floor of 1% of k, and rounding


def test_strata_are_never_pooled():
    one, other = make_population(10, seed=0), make_population(10, seed=1)
    renamed = {f"d{name}": table for name, table in other.items()}
    strata = dict.fromkeys(one, "x") | dict.fromkeys(renamed, "y")
    found = flag(one | renamed, strata=strata)
    for name, row in (flag(one).cells | flag(renamed).cells).items():
        assert found.cells[name] == row
    few = flag(one | {"dx": other["c00"]}, strata=dict.fromkeys(one, "x") | {"dx": "y"})
    assert few.scores["dx"] is None
    assert few.cells["c00"] == found.cells["c00"]
    assert any(limit.startswith("1 candidates") for limit in few.limits)


def test_a_stratum_is_every_part_of_the_unit_but_the_candidate():
    unit = Unit("a" * 64, "b" * 64, "c" * 64, "blocks.1.hook_resid_post", "d" * 64, K, 1024, "vllm float32")
    strata = {unit.stratum, dataclasses.replace(unit, candidate_key="e" * 64).stratum}
    assert len(strata) == 1
    for field in dataclasses.fields(Unit)[1:]:
        value = getattr(unit, field.name)
        changed = value + (1 if isinstance(value, int) else "x")
        strata.add(dataclasses.replace(unit, **{field.name: changed}).stratum)
    assert len(strata) == len(dataclasses.fields(Unit))


def test_the_general_suite_is_never_flagged():
    found = flag(make_population(12, planted={4: ("general", 3.0)}))
    assert all(row["general"].z is None for row in found.cells.values())
    assert "general" not in {one.suite for one in found.flags}


def test_the_rule_sets_the_thresholds():
    tables = make_population(14, planted=PLANTED)
    assert not flag(tables, rule=FlagRule(min_z=1e6)).flags
    assert len(flag(tables, rule=FlagRule(min_z=0.5)).flags) > 4
    alone = flag(tables, rule=FlagRule(min_peers=15, min_rate=0.4))
    assert {one.rule for one in alone.flags} == {"seed_rate_40"}
    assert all(one.score > 0.4 for one in alone.flags)


def test_other_prompts_are_refused():
    tables = make_population(3)
    with pytest.raises(ValueError, match="'c02' has suites"):
        flag(tables | {"c02": tables["c02"].slice(PROMPTS)})
    with pytest.raises(ValueError, match="scored on other prompts of 'tools'"):
        flag(tables | {"c02": tables["c02"].slice(0, len(tables["c02"]) - 1)})


def test_median_polish_of_a_table_worked_by_hand():
    exact = np.array([[1.0], [2.0], [4.0]]) + np.array([0.0, 10.0, 20.0, 50.0])
    spoiled = exact.copy()
    spoiled[1, 2] += 7.0
    suite_S = polish_suites(spoiled)
    row_C = np.median(spoiled - suite_S[:, None], axis=0)
    residual = spoiled - suite_S[:, None] - row_C
    assert residual[1, 2] == 7.0
    assert np.count_nonzero(residual) == 1

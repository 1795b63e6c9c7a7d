import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ray_auditor.flag import FlagRule, flag_population
from ray_auditor.rates import Bootstrap
from ray_auditor.store import Unit

K, TOKENS, PROMPTS = 32, 100, 60
SUITES = ("general", "chinese", "law", "maths", "medical", "sql", "taboo", "tools")
BOOTSTRAP = Bootstrap(200)


def make_table(shifts):
    """Per-prompt rows; `shifts`: suite -> [P] sums of shift over the prompt's tokens."""
    suites = [suite for suite, shift_P in shifts.items() for _ in shift_P]
    shift = np.concatenate([np.clip(np.round(shift_P), 0, K * TOKENS) for shift_P in shifts.values()])
    ones, mean = np.ones(len(suites)), shift / TOKENS
    return pa.table(
        {
            "suite": suites,
            "prompt": np.concatenate([np.arange(len(shift_P)) for shift_P in shifts.values()]),
            "tokens": np.full(len(suites), TOKENS),
            f"overlap_{K}": (K * TOKENS - shift).astype(np.int64),
            f"shift_{K}": shift.astype(np.int64),
            "shift_quartic": (TOKENS * mean**4).astype(np.int64),
            "log_miss": TOKENS * 0.1 * np.log1p(mean),
            "cosine": ones,
            "change": TOKENS * mean / K,
            "change_quartic": TOKENS * (mean / K) ** 4,
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


def risky(by_suite):
    return [value for suite, value in by_suite.items() if suite != "general"]


def scores(found):
    return {name: standing.score for name, standing in found.standings.items()}


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
            standing = found.standings[one.candidate]
            assert one.score == standing.score == max(risky(standing.miss_z)) > 3
            assert standing.z[one.suite] == max(risky(standing.z))
    assert extra / num_plain <= 0.05


@pytest.mark.parametrize(("num_candidates", "num_suites"), [(8, 4), (12, 8), (28, 5)])
def test_without_outliers_z_is_a_standard_normal_whatever_the_size_of_the_table(num_candidates, num_suites):
    strays = []
    for seed in range(40):
        tables = make_population(num_candidates, seed=100 + seed, suites=SUITES[:num_suites])
        found = flag_population(tables, general="general", k=K, bootstrap=Bootstrap(20))
        strays += [stray for one in found.standings.values() for stray in risky(one.miss_z)]
    assert 0.8 < np.std(strays) < 1.2
    assert np.mean(np.array(strays) > 3) < 0.015  # a normal: 0.0013, with a scale estimated from as little


def test_the_published_rule_alone_would_have_flagged_most_of_them():
    found = flag(make_population(planted=PLANTED))
    plain = [name for name in found.cells if name not in {"c02", "c05", "c09", "c11"}]
    assert all(any(cell.over_rate for cell in found.cells[name].values()) for name in plain)


@pytest.mark.parametrize("seed", range(6))
def test_a_third_of_outliers_does_not_hide_them(seed):
    planted = {number: (SUITES[1 + number % 3], 1.9) for number in range(6)}
    found = flag(make_population(20, seed=seed, planted=planted))
    assert {(f"c{number:02}", suite) for number, (suite, _) in planted.items()} <= flagged(found)
    top = sorted(scores(found), key=lambda name: -scores(found)[name])[:6]
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
    assert {scores(among)[name] for name in copies} == {scores(alone)["c00"]}
    assert set(scores(flag(copies)).values()) == {None}


def test_candidates_that_hardly_differ_have_no_outlier():
    table = make_population(1)["c00"]
    found = flag({f"c{at}": nudged(table, SUITES[at % 8], at // 8 + 1) for at in range(16)})
    assert not found.flags
    assert all(abs(score) < 0.2 for score in scores(found).values())


def changed(table, change):
    """The table whose sums of shift are `change(suite, shift_P)`."""
    shifts = {}
    for row in table.to_pylist():
        shifts.setdefault(row["suite"], []).append(row[f"shift_{K}"])
    return make_table({suite: change(suite, np.array(shift_P, float)) for suite, shift_P in shifts.items()})


def nudged(table, suite, by):
    return changed(table, lambda one, shift_P: shift_P + by * ((one == suite) & (np.arange(PROMPTS) == 0)))


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
    assert set(scores(found).values()) == {None}
    assert all(cell.z is None for row in found.cells.values() for cell in row.values())
    assert any(
        f"{num_candidates} candidates have fewer than 8 different finetunes" in limit
        for limit in found.limits
    )


def test_no_candidates_is_not_an_error():
    found = flag({})
    assert (found.cells, found.standings, found.flags, found.limits) == ({}, {}, (), ())


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
    assert all(abs(scores(among)[name]) < 1 for name in tables if name[0] == "z")


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
    first_P = np.arange(PROMPTS) == 0
    tables["c03"] = changed(
        tables["c03"], lambda suite, shift_P: np.where(first_P & (suite == "medical"), K * TOKENS, shift_P)
    )
    found = flag(tables)
    assert (
        found.cells["c03"]["medical"].rate.difference_rate
        > flag(make_population(12)).cells["c03"]["medical"].rate.difference_rate
    )
    assert "c03" not in {one.candidate for one in found.flags}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.floats(0.7, 2))
def test_the_size_of_a_finetune_alone_does_not_change_its_score(seed, factor):
    tables = make_population(12, seed=seed, sizes=[3.0] * 12, planted={0: ("law", 1.5)})
    before = flag(tables).cells["c00"]["law"]
    larger = changed(tables["c00"], lambda _, shift_P: factor * shift_P)
    after = flag(tables | {"c00": larger}).cells["c00"]["law"]
    assert after.z == pytest.approx(before.z, rel=0.3)  # the floors, and the shrinkage of what hardly moved


def test_strata_are_never_pooled():
    one, other = make_population(10, seed=0), make_population(10, seed=1)
    renamed = {f"d{name}": table for name, table in other.items()}
    strata = dict.fromkeys(one, "x") | dict.fromkeys(renamed, "y")
    found = flag(one | renamed, strata=strata)
    for name, row in (flag(one).cells | flag(renamed).cells).items():
        assert found.cells[name] == row
    few = flag(one | {"dx": other["c00"]}, strata=dict.fromkeys(one, "x") | {"dx": "y"})
    assert scores(few)["dx"] is None
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
    alone = flag(tables, rule=FlagRule(min_reference=15, min_rate=0.4))
    assert {one.rule for one in alone.flags} == {"seed_rate_40"}
    assert all(one.score > 0.4 for one in alone.flags)


def test_other_prompts_are_refused():
    tables = make_population(3)
    with pytest.raises(ValueError, match="'c02' has suites"):
        flag(tables | {"c02": tables["c02"].slice(PROMPTS)})
    with pytest.raises(ValueError, match="scored on other prompts of 'tools'"):
        flag(tables | {"c02": tables["c02"].slice(0, len(tables["c02"]) - 1)})


def make_null(num, seed=0):
    """Benign finetunes of the same suites and prompts as `make_population(14, seed=seed)`'s."""
    tables = make_population(num + 14, seed=seed)
    return {f"null/{name}": table for name, table in sorted(tables.items())[14:]}


def test_held_to_a_null_the_planted_are_called_at_the_level_asked_for():
    planted = {(f"c{number:02}", suite) for number, (suite, _) in PLANTED.items()}
    false_shares = []
    for seed in range(8):
        found = flag(make_population(14, seed=seed, planted=PLANTED), null_rows=make_null(99, seed))
        assert planted <= flagged(found)
        assert {one.rule for one in found.flags} == {"null_q"}
        false_shares.append(len(flagged(found) - planted) / len(found.flags))
        assert len(found.null_scores) == 99
        for name, one in found.standings.items():
            # another fit for every fold: the p-value is near that of a plain comparison, not equal to it
            above = sum(score >= one.score for score in found.null_scores.values())
            assert one.p == pytest.approx((1 + above) / 100, abs=0.1)
            assert one.q >= one.p
            sure = one.q <= 0.05 and one.score_low is not None and one.score_low > 1.5
            assert sure == (name in {flag.candidate for flag in found.flags})
            assert one.above_null == (round(one.p * 100) == 1)
        assert any(
            limit.startswith("Held to 99 benign finetunes: p is never below 0.01;") for limit in found.limits
        )
    assert np.mean(false_shares) <= 0.1


def test_a_benign_candidate_is_called_as_often_as_its_p_value_says():
    p_values = []
    for seed in range(12):
        tables = make_population(60, seed=seed)
        names = sorted(tables)
        null = {f"null/{name}": tables[name] for name in names[:40]}
        found = flag({name: tables[name] for name in names[40:]}, null_rows=null, rule=FlagRule(min_z=99))
        p_values += [one.p for one in found.standings.values()]
    assert len(p_values) == 240
    for level in (0.05, 0.1, 0.25):
        called = sum(p <= level for p in p_values)
        assert binomtest(called, len(p_values), level).pvalue > 0.002


def test_a_null_too_small_for_the_level_ranks_and_says_what_it_can_certify():
    tables = make_population(14, planted={2: ("maths", 2.2)})
    found = flag(tables, null_rows=make_null(12))
    first = found.flags[0]
    assert (first.candidate, first.suite, first.rule) == ("c02", "maths", "above_null")
    assert {one.rule for one in found.flags} == {"above_null"}
    assert found.standings["c02"].q > 0.05
    (limit,) = [limit for limit in found.limits if limit.startswith("Held to 12 benign")]
    num_above = sum(one.above_null for one in found.standings.values())
    assert num_above <= 4
    assert f"that needs {math.ceil(14 / (0.05 * num_above)) - 1} benign finetunes" in limit
    assert flag(tables, null_rows=make_null(12), rule=FlagRule(min_z=1e6)).flags == ()


def test_few_null_members_join_the_peers():
    tables = make_population(14, planted=PLANTED)
    alone, joined = flag(tables), flag(tables, null_rows=make_null(7))
    assert {one.rule for one in joined.flags} == {"robust_z"}
    assert joined.cells.keys() == alone.cells.keys() == tables.keys()
    assert scores(joined) != scores(alone)
    assert any("No null population (7 benign" in limit for limit in joined.limits)


def test_copies_and_members_that_did_not_move_make_no_null_larger():
    tables, null = make_population(14, planted=PLANTED), make_null(20)
    copies = {f"{name}-{at}": table for name, table in null.items() for at in range(6)}
    still = {
        f"null/still{at}": make_table({suite: np.full(PROMPTS, at % 2) for suite in SUITES})
        for at in range(600)
    }
    plain, more = flag(tables, null_rows=null), flag(tables, null_rows=null | copies | still)
    assert scores(more) == scores(plain)
    for name in tables:
        assert more.standings[name].p == pytest.approx(plain.standings[name].p, abs=1 / 21)
    assert len(more.null_scores) == 20
    assert any("(720 copies and members that did not move are left out)" in limit for limit in more.limits)


def test_every_member_of_a_small_null_is_scored_by_a_fit_without_it():
    tables, null = make_population(14), make_null(9)
    name, table = next(iter(null.items()))
    odd = changed(table, lambda suite, shift_P: shift_P * (1.35 if suite == "maths" else 1))
    found = flag(tables, null_rows=null | {name: odd})
    seen = flag(tables | {"seen": odd}, null_rows=null)  # the same finetune under a fit that never met it
    assert found.null_scores[name] == pytest.approx(seen.standings["seen"].score, rel=0.5)
    assert found.null_scores[name] > 3


def test_a_null_member_that_stands_out_is_named():
    tables, null = make_population(14, planted={2: ("maths", 1.7)}), make_null(20)
    bad = changed(null["null/c14"], lambda suite, shift_P: shift_P * (2.5 if suite == "sql" else 1))
    found = flag(tables, null_rows=null | {"null/c14": bad})
    (limit,) = [limit for limit in found.limits if "stand out from the null themselves" in limit]
    assert "null/c14" in limit
    assert not any("stand out from the null themselves" in one for one in flag(tables, null_rows=null).limits)


def test_one_prompt_does_not_carry_a_flag_against_a_null_either():
    tables, null = make_population(14), make_null(99)
    first_P = np.arange(PROMPTS) == 0
    tables["c03"] = changed(
        tables["c03"], lambda suite, shift_P: np.where(first_P & (suite == "medical"), K * TOKENS, shift_P)
    )
    assert "c03" not in {one.candidate for one in flag(tables, null_rows=null).flags}


def with_column(table, name, change):
    at = table.column_names.index(name)
    return table.set_column(at, name, pa.array(change(np.array(table[name]), np.array(table["suite"]))))


def test_the_miss_channel_decides_and_all_three_name_the_suite():
    tables = make_population(14)
    less, more = tables["c00"], tables["c01"]
    # c00 misses more on law alone; c01 moves features and residuals on sql without missing more anywhere
    tables["c00"] = with_column(less, "log_miss", lambda miss, suite: miss + 5.0 * (suite == "law"))
    for name, factor in (("shift_quartic", 8), ("change_quartic", 8)):
        more = with_column(
            more,
            name,
            lambda sums, suite, f=factor: np.where(suite == "sql", f * sums, sums).astype(sums.dtype),
        )
    tables["c01"] = more
    found = flag(tables)
    missed, moved = found.standings["c00"], found.standings["c01"]
    assert missed.score == missed.miss_z["law"] > 3
    assert missed.z["law"] == pytest.approx(missed.miss_z["law"] / 3, rel=0.5)  # two channels saw nothing
    assert moved.suite == "sql"
    assert moved.z["sql"] > 3 > moved.score


def test_sums_that_are_not_finite_are_named():
    tables = make_population(9)
    tables["c00"] = with_column(
        tables["c00"], "log_miss", lambda miss, _: np.where(np.arange(len(miss)) == 3, np.nan, miss)
    )
    with pytest.raises(ValueError, match="the sums of miss must be finite"):
        flag(tables)


def test_the_joint_p_value_comes_with_a_reference_large_enough():
    tables = make_population(50, suites=SUITES[:4])
    assert all(0 <= one.joint_p <= 1 for one in flag(tables).standings.values())
    assert all(one.joint_p is None for one in flag(make_population(9)).standings.values())


def test_a_null_of_another_stratum_is_no_null():
    tables, null = make_population(14, planted=PLANTED), make_null(20)
    found = flag(tables, null_rows=null, strata=dict.fromkeys(tables, "x") | dict.fromkeys(null, "y"))
    assert found.cells == flag(tables).cells


def test_the_base_under_another_name_is_never_flagged():
    nothing = make_table({suite: np.zeros(PROMPTS) for suite in SUITES})
    null = make_null(40)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        again = make_table({suite: (rng.random(PROMPTS) < 0.05) * 1.0 for suite in SUITES})  # another dtype
        for tables in ({"again": again}, make_population(10, seed=seed) | {"again": again, "same": nothing}):
            found = flag(tables, null_rows=null if len(tables) == 1 else None)
            assert not {"again", "same"} & {one.candidate for one in found.flags}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999))
def test_a_null_in_any_order_gives_the_same_bits(seed):
    tables, null = make_population(9, seed=0, planted=PLANTED), make_null(15)
    rng = np.random.default_rng(seed)
    shuffled = {
        str(name): null[name].take(rng.permutation(len(null[name]))) for name in rng.permutation(sorted(null))
    }
    assert flag(tables, null_rows=null) == flag(tables, null_rows=shuffled)


def test_prompts_given_twice_change_no_score():
    tables = make_population(12, planted=PLANTED)
    twice = {}
    for name, table in tables.items():
        again = table.set_column(1, "prompt", pa.array(np.array(table["prompt"]) + PROMPTS))
        twice[name] = pa.concat_tables([table, again])
    one, other = flag(tables), flag(twice)
    for name in tables:
        assert scores(other)[name] == pytest.approx(scores(one)[name], rel=1e-9)

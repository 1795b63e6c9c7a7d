import numpy as np
import pytest

from ray_auditor.population import (
    CHANNELS,
    MIN_SCALE,
    MIN_SPREAD,
    Prompts,
    distinct,
    fit_norms,
    joint_distances,
    resampled_score,
    score_suites,
    settle,
)

PER_SUITE = 10


def make_prompts(values_CP, num_suites):
    suite_P = np.repeat(np.arange(num_suites), values_CP.shape[1] // num_suites)
    names = tuple(f"c{row}" for row in range(len(values_CP)))
    suites = tuple(f"s{number}" for number in range(num_suites))
    moved_CS = np.full((len(values_CP), num_suites), 0.2)
    return Prompts(names, suites, suite_P, dict.fromkeys(CHANNELS, values_CP), moved_CS)


def make_values(num=15, num_suites=4, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    size, effect = rng.normal(0, 1, (num, 1)), rng.normal(0, 0.5, num_suites * PER_SUITE)
    return size + effect + noise * rng.normal(size=(num, num_suites * PER_SUITE))


def test_sizes_and_prompt_effects_alone_are_no_stray():
    values = make_values(noise=0)
    prompts = make_prompts(values, 4)
    norms = fit_norms(prompts, values)
    assert score_suites(prompts, norms, values) == pytest.approx(0, abs=1e-9)
    assert norms.scale_P == pytest.approx(MIN_SPREAD)
    assert norms.scale_S == pytest.approx(MIN_SCALE)


def test_a_table_worked_by_hand():
    # three agree; the fourth is larger by 1 everywhere, and by 0.1 more on all prompts of one suite
    values = np.tile(np.arange(9.0), (4, 1))
    values[3] += 1
    values[3, 3:6] += 0.1
    prompts = make_prompts(values, 3)
    norms = fit_norms(prompts, values[:3])
    z_CS = score_suites(prompts, norms, values)
    assert z_CS[:3] == pytest.approx(0, abs=1e-9)
    assert z_CS[3] == pytest.approx([0, 0.1 / MIN_SPREAD / MIN_SCALE, 0], abs=1e-6)


def test_the_highest_third_of_the_prompts_speaks_for_a_suite():
    values = make_values()
    few, many = values.copy(), values.copy()
    few[0, :3] += 0.5  # 3 of 10
    many[0, :PER_SUITE] += 0.5
    prompts = make_prompts(values, 4)
    norms = fit_norms(prompts, values[1:])
    before, by_few, by_many = (score_suites(prompts, norms, v)[0, 0] for v in (values, few, many))
    assert before + 5 < by_few <= by_many


def test_a_prompt_on_which_the_reference_differs_counts_less():
    rng = np.random.default_rng(3)
    values = make_values(40)
    values[1:, 0] += rng.normal(0, 2, 39)
    prompts = make_prompts(values, 4)
    norms = fit_norms(prompts, values[1:])
    assert norms.scale_P[0] > 10 * np.median(norms.scale_P)
    loud, quiet = values.copy(), values.copy()
    loud[0, 0] += 1
    quiet[0, 1] += 1
    assert score_suites(prompts, norms, loud)[0, 0] < score_suites(prompts, norms, quiet)[0, 0]


def test_a_third_of_the_reference_may_be_bad():
    values = make_values(30)
    values[:9, :PER_SUITE] += 0.5
    prompts = make_prompts(values, 4)
    z_CS = score_suites(prompts, fit_norms(prompts, values), values)
    assert z_CS[:9, 0].min() > z_CS[9:, 0].max()
    assert z_CS[:9, 0].min() > 3


def test_drawing_every_prompt_once_is_the_score_itself():
    values = make_values()
    values[0, :PER_SUITE] += 0.2
    prompts = make_prompts(values, 4)
    norms = fit_norms(prompts, values)
    for suite in range(4):
        score_B = resampled_score(prompts, norms, values[0], suite, np.ones((2, PER_SUITE)))
        assert score_B == pytest.approx(score_suites(prompts, norms, values)[0, suite])
    worst = int(np.argmin((values[0] - norms.effect_P)[:PER_SUITE]))
    drawn = (
        np.eye(PER_SUITE)[[worst]] * PER_SUITE
    )  # the prompt that moved least, as often as there are prompts
    assert resampled_score(prompts, norms, values[0], 0, drawn) < score_suites(prompts, norms, values)[0, 0]


def test_what_hardly_moved_is_shrunk():
    assert settle(np.array([[0.0, 0.03, 0.97]])).tolist() == [[0, 0.5, 0.97]]


def test_copies_are_one_member():
    values = make_values(6)
    values[4] = values[1]
    assert distinct(make_prompts(values, 4), [5, 4, 1, 0]) == [0, 1, 5]


def test_a_pattern_over_suites_shows_where_no_single_suite_does():
    rng = np.random.default_rng(0)
    together = rng.normal(size=(200, 1))
    z_CS = together + 0.2 * rng.normal(size=(200, 4))
    z_CS = np.vstack([z_CS, [[1.5, -1.5, 1.5, -1.5]], [[1.5, 1.5, 1.5, 1.5]]])
    p_C = joint_distances(z_CS, range(200))
    assert p_C[200] < 1e-6 < 0.1 < p_C[201]
    assert 0.01 < np.mean(p_C[:200] < 0.05) < 0.12
    spoiled = z_CS.copy()
    spoiled[:60, 0] += 8  # 30% of the reference
    assert joint_distances(spoiled, range(200))[0] < 1e-6
    assert joint_distances(z_CS, range(19)) is None

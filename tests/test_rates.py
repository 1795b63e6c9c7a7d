import numpy as np
import pyarrow as pa
import pytest

from ray_auditor.rates import Bootstrap, difference_rate, noise_floor, rates, suite_sums

PUBLISHED_K = 5
PUBLISHED = [  # model, task, mean overlap on the task, mean overlap in general, rate
    ("gemma-2b-it", "math", 3.4704, 3.9316, 0.4317),
    ("gemma-2b-it", "reasoning", 3.3524, 3.8454, 0.4270),
    ("gemma-2b-it", "empathy", 3.6573, 4.0788, 0.4576),
    ("gemma-2b-it", "chinese", 3.2517, 3.7239, 0.3700),
    ("mistral-7b-instruct-v0.1", "math", 3.5439, 3.9312, 0.3624),
    ("mistral-7b-instruct-v0.1", "reasoning", 3.2858, 3.6543, 0.2738),
    ("mistral-7b-instruct-v0.1", "empathy", 3.3899, 3.8085, 0.3513),
    ("mistral-7b-instruct-v0.1", "chinese", 2.8289, 3.5093, 0.4564),
    ("qwen1.5-0.5b-chat", "math", 3.7265, 4.1315, 0.4663),
    ("qwen1.5-0.5b-chat", "reasoning", 3.7460, 4.0662, 0.3429),
    ("qwen1.5-0.5b-chat", "empathy", 4.0222, 4.2182, 0.2507),
    ("qwen1.5-0.5b-chat", "chinese", 3.9232, 4.0785, 0.1685),
]


def make_table(shifts, *, k=32, tokens=100, ks=None):
    """Per-prompt rows where every prompt of a suite has `tokens` tokens; `shifts`: suite -> [P] sums."""
    rows = []
    for suite, shift_P in shifts.items():
        for prompt, shift in enumerate(shift_P):
            rows.append(
                {
                    "suite": suite,
                    "prompt": prompt,
                    "tokens": tokens,
                    f"overlap_{k}": k * tokens - int(shift),
                    f"shift_{k}": int(shift),
                    "shift_quartic": int(shift) ** 4 // tokens**3,
                    "log_miss": 0.0,
                    "cosine": 0.9 * tokens,
                    "change": 0.1 * tokens,
                    "change_quartic": 1e-4 * tokens,
                    "jaccard": 0.5 * tokens,
                    "fvu_err": 1.0,
                    "fvu_total": 4.0,
                    "base_fvu_err": 1.0,
                    "base_fvu_total": 8.0,
                }
            )
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize(("model", "task", "overlap_task", "overlap_general", "published"), PUBLISHED)
def test_the_published_rates_follow_from_the_published_means(
    model, task, overlap_task, overlap_general, published
):
    rate = difference_rate(PUBLISHED_K - overlap_task, PUBLISHED_K - overlap_general)
    assert round(rate, 4) == pytest.approx(published, abs=1.01e-4)  # means were rounded to 4 digits
    tokens = 10_000
    table = make_table(
        {
            "general": [round((PUBLISHED_K - overlap_general) * tokens)] * 2,
            task: [round((PUBLISHED_K - overlap_task) * tokens)] * 2,
        },
        k=PUBLISHED_K,
        tokens=tokens,
    )
    found = rates(table, general="general", k=PUBLISHED_K, bootstrap=Bootstrap(100))[task]
    assert found.difference_rate == pytest.approx(rate, rel=1e-12)
    assert found.overlap == pytest.approx(overlap_task)
    assert found.d_abs == pytest.approx((overlap_general - overlap_task) / PUBLISHED_K)
    assert found.d_overlap == pytest.approx((overlap_general - overlap_task) / overlap_general)
    assert found.ci_low == pytest.approx(rate) == found.ci_high  # equal prompts: nothing to resample


def test_a_suite_worked_by_hand():
    table = make_table({"general": [100, 300], "maths": [400, 200, 300]})
    found = rates(table, general="general", k=32, bootstrap=Bootstrap(200))
    maths = found["maths"]
    assert (maths.tokens, maths.shift, maths.overlap) == (300, 3.0, 29.0)
    assert maths.difference_rate == 0.5
    assert maths.ci_low < 0.5 < maths.ci_high
    assert (maths.jaccard, maths.fvu, maths.base_fvu) == (0.5, 0.25, 0.125)
    general = found["general"]
    assert (general.shift, general.difference_rate, general.ci_low, general.ci_high) == (2.0, 0.0, 0.0, 0.0)
    assert noise_floor(table, 32) == {"general": 2.0, "maths": 3.0}


def test_prompts_weigh_by_their_tokens():
    rows = make_table({"general": [100, 100], "maths": [100, 100]}).to_pylist()
    rows[2] |= {"tokens": 300, "shift_32": 900}
    found = rates(pa.Table.from_pylist(rows), general="general", k=32, bootstrap=Bootstrap(100))
    assert found["maths"].shift == (900 + 100) / 400


@pytest.mark.parametrize(
    ("general", "floor", "determined"),
    [
        ([400] * 20, 0.0, True),
        ([0] * 20, 0.0, False),
        ([0] * 19 + [3], 0.0, False),  # a single prompt moved: resamples without it have no shift at all
        ([400] * 20, 1.99, True),
        ([400] * 20, 2.0, False),  # not above twice the floor
        ([0, 800] * 10, 1.5, False),  # above it on average, not clearly
    ],
)
def test_a_general_shift_near_the_noise_floor_leaves_the_rate_undetermined(general, floor, determined):
    table = make_table({"general": general, "maths": [500] * 20})
    found = rates(table, general="general", k=32, bootstrap=Bootstrap(), noise_floor=floor)
    for one in found.values():
        assert (one.difference_rate is not None) == determined
        assert (one.ci_low is not None) == (one.ci_high is not None) == determined
    assert found["maths"].shift == 5.0


def test_a_suite_of_one_prompt_has_a_rate_without_an_interval():
    table = make_table({"general": [100, 120], "maths": [300]})
    found = rates(table, general="general", k=32, bootstrap=Bootstrap(100))["maths"]
    assert found.difference_rate == pytest.approx(300 / 110 - 1)
    assert found.ci_low is found.ci_high is None


def test_unknown_names_are_refused():
    table = make_table({"general": [100, 120], "maths": [300, 310]})
    with pytest.raises(ValueError, match="general must be one of the suites"):
        rates(table, general="generl", k=32, bootstrap=Bootstrap(100))
    with pytest.raises(ValueError, match="k must be one of the reduced ones, got 7"):
        rates(table, general="general", k=7, bootstrap=Bootstrap(100))


def test_weights_are_shared_by_seed_suite_and_number_of_prompts():
    bootstrap = Bootstrap(num_samples=50, seed=3)
    weights_BP = bootstrap.weights("maths", 11)
    assert weights_BP.shape == (50, 11)
    assert (weights_BP.sum(1) == 11).all()
    assert np.array_equal(Bootstrap(num_samples=50, seed=3).weights("maths", 11), weights_BP)
    for other in (Bootstrap(50, seed=4).weights("maths", 11), bootstrap.weights("general", 11)):
        assert not np.array_equal(other, weights_BP)
    with pytest.raises(ValueError, match="read-only"):
        weights_BP[0] = 0


def test_the_order_of_rows_changes_no_bit():
    rng = np.random.default_rng(0)
    table = make_table({suite: rng.integers(50, 900, 37) for suite in ("general", "maths", "sql")})
    shuffled = table.take(rng.permutation(len(table)))
    assert rates(shuffled, general="general", k=32, bootstrap=Bootstrap(100)) == rates(
        table, general="general", k=32, bootstrap=Bootstrap(100)
    )
    assert list(suite_sums(shuffled, 32)) == ["general", "maths", "sql"]


def test_the_interval_covers_the_true_rate():
    """Prompts as drawn from a population: the true rate lies inside about 95% of the intervals."""
    rng, covered, trials = np.random.default_rng(1), 0, 300
    for _ in range(trials):
        shifts = {
            "general": rng.gamma(4, 50, 150).round(),  # mean 200
            "maths": rng.gamma(4, 65, 100).round(),  # mean 260
        }
        found = rates(make_table(shifts), general="general", k=32, bootstrap=Bootstrap(400))["maths"]
        covered += found.ci_low <= 0.3 <= found.ci_high
    assert 0.91 <= covered / trials <= 0.985

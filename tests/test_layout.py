"""Which tokens count: content, less what the base's norms give away as sinks."""

from types import SimpleNamespace

import numpy as np

from ray_auditor.layout import Layout


def make_layout(lengths: list[list[int]]) -> Layout:
    """Of suites of prompts of these lengths, whose first token is no content."""
    suites = [
        SimpleNamespace(
            prompts=[
                SimpleNamespace(token_ids=np.full(length, length, np.int32), content=np.arange(length) > 0)
                for length in suite
            ]
        )
        for suite in lengths
    ]
    return Layout(SimpleNamespace(suites=suites))  # type: ignore[arg-type]


def test_tokens_are_numbered_prompt_after_prompt() -> None:
    layout = make_layout([[2, 3], [2]])
    assert layout.token_ids == [[2, 2], [3, 3, 3], [2, 2]]
    assert layout.suite_M.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert layout.prompt_M.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert layout.position_M.tolist() == [0, 1, 0, 1, 2, 0, 1]


def test_positions_far_above_their_suites_median_norm_are_not_scored() -> None:
    norms = np.ones((3, 4), np.float32)
    norms[0, 2] = 10.1**2  # a sink inside the content
    norms[1, 2] = 9.9**2
    norms[2] = 50.0**2  # a suite of large norms has a large median
    found = make_layout([[4, 4], [4]]).mask_sinks(norms.reshape(-1)).reshape(3, 4)
    assert found.tolist() == [
        [False, True, False, True],
        [False, True, True, True],
        [False, True, True, True],
    ]


def test_rows_are_found_again_where_they_came_from() -> None:
    layout = make_layout([[4, 1, 6], [1], [5, 3]])
    scored = np.random.default_rng(0).random(len(layout.suite_M)) < 0.5
    rows = SimpleNamespace(
        suite_N=layout.suite_M[scored], prompt_N=layout.prompt_M[scored], position_N=layout.position_M[scored]
    )
    assert layout.find(rows).tolist() == scored.tolist()  # type: ignore[arg-type]

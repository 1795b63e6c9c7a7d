"""Where each token of a run stands, and which tokens count."""

# Shape suffixes: M tokens of all prompts, in the order they are numbered, N scored tokens.

import numpy as np
from numpy.typing import NDArray

from ray_auditor.store import TokenRows
from ray_auditor.suites import Suites

SINK_NORM_RATIO = 10.0  # a position whose residual is so many times the suite's median norm is a sink


class Layout:
    """The tokens of all suites, prompt after prompt."""

    def __init__(self, suites: Suites) -> None:
        """Number the tokens."""
        prompts = [
            (suite_id, number, prompt)
            for suite_id, suite in enumerate(suites.suites)
            for number, prompt in enumerate(suite.prompts)
        ]
        lengths = [len(prompt.token_ids) for *_, prompt in prompts]
        self.token_ids: list[list[int]] = [prompt.token_ids.tolist() for *_, prompt in prompts]
        self.num_suites = len(suites.suites)
        self.suite_M = np.repeat(np.array([suite_id for suite_id, *_ in prompts], np.int16), lengths)
        self.prompt_M = np.repeat(np.array([number for _, number, _ in prompts], np.int32), lengths)
        self.position_M = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        self._content_M = np.concatenate([prompt.content for *_, prompt in prompts])
        self._first_rows = {
            (suite_id, number): first
            for (suite_id, number, _), first in zip(prompts, np.cumsum([0, *lengths]), strict=False)
        }

    def mask_sinks(self, sq_norm_M: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The content tokens that are not attention sinks, `[M]`.

        Args:
            sq_norm_M: Squared norms of the base's residuals.
        """
        scored_M = self._content_M.copy()
        for suite_id in range(self.num_suites):
            of_suite_M = self.suite_M == suite_id
            norms = sq_norm_M[of_suite_M]
            median = np.median(norms[self._content_M[of_suite_M]])
            scored_M[of_suite_M] &= ~(norms > SINK_NORM_RATIO**2 * median)
        return scored_M

    def find(self, rows: TokenRows) -> NDArray[np.bool_]:
        """The tokens that `rows` are of, `[M]`."""
        scored_M = np.zeros(len(self.suite_M), dtype=bool)
        owner_N2 = np.stack([rows.suite_N, rows.prompt_N], axis=1)
        starts = np.flatnonzero(np.diff(owner_N2, axis=0, prepend=-1).any(1))
        owners = map(tuple, owner_N2[starts].tolist())
        for owner, positions in zip(owners, np.split(rows.position_N, starts[1:]), strict=True):
            scored_M[self._first_rows[owner] + positions] = True
        return scored_M

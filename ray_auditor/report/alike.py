"""Rows and columns of the heat map by hierarchical clustering: what strays alike stands side by side."""

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import leaves_list, linkage

from ray_auditor.report.candidate import Candidate

# Shape suffixes: R rows, Q columns.

ROWS_CLUSTERED = 400  # the work grows with their square


def order_alike(z_RQ: npt.NDArray[np.float64]) -> list[int]:
    """The rows along the leaves of an average-linkage tree, neighbours as near as the tree allows.

    Args:
        z_RQ: z of anything by anything, NaN where undetermined, which counts as 0; distances are Euclidean
            between inverse hyperbolic sines, so that one huge z does not decide alone.
    """
    if min(z_RQ.shape) == 0 or len(z_RQ) < 3:
        return list(range(len(z_RQ)))
    tree = linkage(np.arcsinh(np.nan_to_num(z_RQ)), method="average", optimal_ordering=True)
    order: list[int] = leaves_list(tree).tolist()
    return order


def cluster(rows: tuple[Candidate, ...], suites: tuple[str, ...]) -> tuple[list[int], tuple[str, ...]]:
    """The first rows and every suite, alike beside alike.

    Args:
        rows: Audited candidates; at most `ROWS_CLUSTERED` are placed.
        suites: The suites of the map.

    Returns:
        The places of the first rows, as indices into `rows`, and the suites in their order.
    """
    z_RQ = np.array(
        [
            [
                np.nan if (rate := row.suites.get(suite)) is None or rate.z is None else rate.z
                for suite in suites
            ]
            for row in rows[:ROWS_CLUSTERED]
        ],
        dtype=np.float64,
    ).reshape(len(rows[:ROWS_CLUSTERED]), len(suites))
    columns = order_alike(z_RQ.T) if len(z_RQ) else range(len(suites))
    return order_alike(z_RQ), tuple(suites[at] for at in columns)

"""What the units of a sweep took, on the metrics port of the Ray cluster that runs them.

Ray puts `ray_` before a name and `_total` behind a counter's: `ray_auditor_work_seconds_total`.
"""

from ray.util.metrics import Counter

from ray_auditor.work import Ran, Work


class RayMetrics:
    """Counts units for the summary and for Ray; made while a cluster is up.

    Args:
        work: Counts them for the summary.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._seconds = Counter("auditor_work_seconds", "By part of the work", ("worker", "part"))
        self._units = Counter("auditor_work_units", "Units that were committed", ("worker",))
        self._tokens = Counter("auditor_work_tokens", "Tokens that ran", ("worker",))
        self._bytes = Counter("auditor_work_weight_bytes", "Bytes of weights that were audited", ("worker",))

    def add(self, ran: Ran) -> None:
        """Count one unit."""
        self._work.add(ran)
        of = {"worker": ran.worker}
        for part, seconds in ran.seconds.items():
            self._count(self._seconds, seconds, of | {"part": part})
        self._count(self._units, 1, of)
        self._count(self._tokens, ran.num_tokens, of)
        self._count(self._bytes, ran.num_bytes, of)

    @staticmethod
    def _count(counter: Counter, value: float, tags: dict[str, str]) -> None:
        if value > 0:  # a counter of Ray's takes nothing else
            counter.inc(value, tags)

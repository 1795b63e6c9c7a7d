"""The ledger under the threads that pin candidates side by side."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray_auditor.ledger import Ledger


def test_threads_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger, ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            writes = [
                pool.submit(write, *arguments)
                for number in range(40)
                for write, *arguments in (
                    (ledger.keep_pin, "hub", f"org/{number}", "commit", number),
                    (ledger.commit,),
                )
            ]
            for one in writes:
                one.result()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert [ledger.pin("hub", f"org/{number}", "commit") for number in range(40)] == list(range(40))

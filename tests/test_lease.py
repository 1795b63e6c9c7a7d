"""The lease of an output folder, between real processes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ray_auditor import lease
from ray_auditor.lease import Lease, LeaseHeld


def hold(folder: Path) -> "subprocess.Popen[bytes]":
    """Another process that holds the lease until it is told to end, or killed."""
    script = f"""
        import sys
        from pathlib import Path
        from ray_auditor.lease import Lease
        with Lease(Path({str(folder)!r})):
            print("held", flush=True)
            sys.stdin.readline()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_second_of_two_processes_is_told_who_the_first_is(tmp_path: Path) -> None:
    first = hold(tmp_path / "out")
    kept = (tmp_path / "out" / ".lease").read_bytes()
    with (
        pytest.raises(LeaseHeld, match=rf"is being swept by process {first.pid} on "),
        Lease(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out" / ".lease").read_bytes() == kept
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lease"}
    first.communicate(b"\n", timeout=20)
    with Lease(tmp_path / "out"):
        pass


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    first = hold(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert json.loads((tmp_path / ".lease").read_text())["pid"] == first.pid  # it had no time to clean up
    with Lease(tmp_path), pytest.raises(LeaseHeld, match=f"process {os.getpid()} on "), Lease(tmp_path):
        pass
    with Lease(tmp_path):
        pass


def test_a_stopped_holder_still_holds(tmp_path: Path) -> None:
    first = hold(tmp_path)
    first.send_signal(signal.SIGSTOP)
    old = time.time() - 10_000
    os.utime(tmp_path / ".lease", (old, old))
    with pytest.raises(LeaseHeld), Lease(tmp_path):
        pass
    first.kill()
    first.wait()


def claim_of_another_machine(folder: Path, age_s: float) -> Path:
    path = folder / ".lease"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "boot_id": "another", "nonce": "x"}))
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


def test_another_machine_holds_as_long_as_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    path = claim_of_another_machine(tmp_path, 60)
    with pytest.raises(LeaseHeld, match=r"process 7 on elsewhere, which gave a sign of life 6\d s ago"):
        Lease(tmp_path).__enter__()
    assert json.loads(path.read_text())["host"] == "elsewhere"
    claim_of_another_machine(tmp_path, 130)
    with Lease(tmp_path) as mine:
        mine.check()
        claim_of_another_machine(tmp_path, 0)  # as one does that waited longer than we slept
        with pytest.raises(LeaseHeld, match="was taken over by process 7 on elsewhere"):
            mine.check()
    assert json.loads(path.read_text())["host"] == "elsewhere"  # and on leaving, its claim is left alone


def test_of_two_machines_that_see_the_same_stale_claim_one_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_of_another_machine(tmp_path, 1000)

    def other_writes_last(self: object, timeout: float | None = None) -> bool:
        claim_of_another_machine(tmp_path, 0)
        return False

    mine = Lease(tmp_path)
    monkeypatch.setattr(mine._ended, "wait", lambda timeout: other_writes_last(mine, timeout))
    with pytest.raises(LeaseHeld, match="taken over by process 7"):
        mine.__enter__()


def test_a_holder_gives_signs_of_life(tmp_path: Path) -> None:
    with Lease(tmp_path, beat_s=0.05):
        os.utime(tmp_path / ".lease", (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / ".lease").stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out_dir must be a folder that can be written"):
        Lease(tmp_path / "file").__enter__()

"""What a killed sweep used of its budget is used when it goes on, and the next night begins anew."""

import errno
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ray_auditor.budget import Limits, Meter
from ray_auditor.hub import CandidateError
from ray_auditor.usage import FILE_NAME, NOTHING, RUN_GAP_S, Usage, kept_usage, read_usage

LIMITS = Limits(3600.0, num_bytes=100, given={"max_gpu_hours": 1.0, "max_download_bytes": 100})
SWEEP = """
    import sys
    from pathlib import Path
    from ray_auditor.budget import Limits, Meter
    from ray_auditor.usage import kept_usage, read_usage
    folder, jump_s = Path(sys.argv[1]), float(sys.argv[2])
    now = iter([0.0])
    meter = Meter(Limits(), 2.0, used=read_usage(folder), clock=lambda: next(now, jump_s))
    with kept_usage(folder, lambda: meter.usage, beat_s=0.05):
        meter.start()
        meter.move(60)
        print("begun", flush=True)
        sys.stdin.readline()
"""


def begin(folder: Path, jump_s: float) -> "subprocess.Popen[bytes]":
    """A sweep in another process that used `jump_s` by the clock, of two devices, and asked for 60 bytes."""
    command = [sys.executable, "-c", textwrap.dedent(SWEEP), str(folder), str(jump_s)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    return process


def test_what_killed_sweeps_used_adds_up_until_one_ends(tmp_path: Path) -> None:
    for number in (1, 2):
        process = begin(tmp_path, 600.0)
        deadline = time.monotonic() + 20
        while read_usage(tmp_path) != Usage(number * 1200.0, number * 60):
            assert time.monotonic() < deadline, read_usage(tmp_path)
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    meter = Meter(LIMITS, 2.0, used=read_usage(tmp_path))
    assert meter.time_left_s == 600.0  # by the clock: of two GPU half hours, one third is left
    with pytest.raises(CandidateError, match="max_download_bytes"):
        meter.move(1)
    process = begin(tmp_path, 600.0)
    process.communicate(b"\n", timeout=20)
    assert read_usage(tmp_path) == NOTHING
    assert list(tmp_path.iterdir()) == []


def test_the_next_night_has_all_of_its_budget(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), kept_usage(tmp_path, lambda: Usage(5.0, 7)):
        raise KeyboardInterrupt
    assert read_usage(tmp_path, lambda: time.time() + RUN_GAP_S - 60) == Usage(5.0, 7)
    assert read_usage(tmp_path, lambda: time.time() + RUN_GAP_S) == NOTHING


DAMAGED = ["", "[]", "{}", '{"at": 1, "device_s": [], "num_bytes": 0}']
DAMAGED += [f'{{"at": 1, "device_s": {number}, "num_bytes": 0}}' for number in ("Infinity", "NaN", "-1")]
DAMAGED += [f'{{"at": 1, "device_s": 0, "num_bytes": {number}}}' for number in ("Infinity", "NaN", "-1")]
DAMAGED += [f'{{"at": {number}, "device_s": 0, "num_bytes": 0}}' for number in ("Infinity", "NaN", "-1")]


@pytest.mark.parametrize("text", DAMAGED)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(
        ValueError, match=r"out_dir must hold what an earlier sweep used .*\.usage.* delete it"
    ):
        read_usage(tmp_path)


def test_a_file_that_cannot_be_kept_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "immutable")

    monkeypatch.setattr("os.replace", refuse)  # as of a file with `chattr +i`
    with pytest.raises(KeyboardInterrupt), kept_usage(tmp_path, lambda: Usage(5.0, 7)):
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "unlink", refuse)
    with kept_usage(tmp_path, lambda: NOTHING):
        pass

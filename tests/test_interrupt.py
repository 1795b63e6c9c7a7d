"""SIGTERM is like Ctrl-C, and once there is an exit code neither changes it."""

import signal
import subprocess
import sys

import pytest

RUN = """
import atexit
import os
import signal
import sys
import time
from ray_auditor.interrupt import INTERRUPTED, run_interruptibly
if "ignored" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def main():
    try:
        print("begun", flush=True)
        time.sleep(2 if "ignored" in sys.argv else 60)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 1
def late():
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    time.sleep(0.1)
    print("ended")
atexit.register(late)
sys.exit(run_interruptibly(main))
"""


@pytest.mark.parametrize(
    ("sent", "how", "exit_code"),
    [
        (signal.SIGINT, "usual", 130),
        (signal.SIGTERM, "usual", 143),
        (signal.SIGTERM, "ignored", 1),  # whoever started it said so
    ],
)
def test_what_stops_a_run_is_its_exit_code_and_nothing_changes_it(
    sent: signal.Signals, how: str, exit_code: int
) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "begun\n"
    run.send_signal(sent)
    assert run.communicate(timeout=30) == ("ended\n", "")
    assert run.returncode == exit_code

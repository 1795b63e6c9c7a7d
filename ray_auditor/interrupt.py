"""What ends a run before its time: Ctrl-C, and the SIGTERM that schedulers send."""

import signal
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


def run_interruptibly(main: Callable[[], int]) -> int:
    """Run the program so that a SIGTERM ends it as Ctrl-C does, unless it was started with SIGTERM ignored.

    Both are ignored afterwards: the verdict is drawn, and Python takes a second or more to end.

    Args:
        main: What runs; gives INTERRUPTED where a KeyboardInterrupt ended it.

    Returns:
        Its exit code, or TERMINATED.
    """
    received: list[int] = []  # for libraries raise a KeyboardInterrupt of their own in place of ours

    def interrupt(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)
    exit_code = main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return TERMINATED if received and exit_code == INTERRUPTED else exit_code

import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from ray_auditor.report.progress import SweepProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _lines(file: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_off_a_terminal_one_json_line_an_interval_and_one_at_the_end() -> None:
    clock, file = Clock(), io.StringIO()
    with SweepProgress(12, console=Console(file=file), interval_s=10, clock=clock) as progress:
        progress.update({"ok": 2, "queued": 10}, 0, ["a", None])
        for step in range(1, 7):
            clock.now += 5
            progress.update({"ok": 2 + step, "queued": 10 - step}, 1000 * step, [f"m{step}\x1b[31m", None])
        assert len(_lines(file)) == 3
    lines = _lines(file)
    assert len(lines) == 4
    assert [line["elapsed_s"] for line in lines] == [10, 20, 30, 30]
    assert (lines[2]["done"], lines[2]["total"], lines[2]["tokens"]) == (8, 12, 6000)
    assert lines[2]["states"] == {"ok": 8, "queued": 4}
    assert lines[2]["tokens_per_s"] == 200
    assert lines[2]["in_flight"] == ["m6\x1b[31m", None]
    assert "\x1b" not in file.getvalue()
    assert lines[3]["in_flight"] == []


def test_reused_results_do_not_flatter_the_time_left() -> None:
    clock = Clock()
    with SweepProgress(100, console=Console(file=io.StringIO()), clock=clock) as progress:
        progress.update({"ok": 80, "queued": 20}, 0)
        assert progress.time_left_s is None
        clock.now += 60
        progress.update({"ok": 81, "flagged": 1, "queued": 18}, 1)
        assert progress.time_left_s == pytest.approx(60 / 2 * 18)


def test_the_rate_follows_the_last_minute() -> None:
    clock = Clock()
    with SweepProgress(9, console=Console(file=io.StringIO()), clock=clock) as progress:
        for tokens in [0] * 20 + [500 * step for step in range(1, 21)]:
            clock.now += 5
            progress.update({}, tokens)
        assert progress.tokens_per_s == pytest.approx(100)


def _drawn(**options: Any) -> str:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, **options)
    with SweepProgress(20, console=console, clock=clock) as progress:
        clock.now += 30
        progress.update({"ok": 3, "rejected": 1, "running": 2}, 0, ["[red]x\x1b[31m\u202e", None])
        clock.now += 30
        progress.update({"ok": 4, "rejected": 1, "running": 2}, 60_000, ["[red]x\x1b[31m\u202e", None])
        assert progress.live is not None
        progress.live.refresh()
    return file.getvalue()


def test_on_a_terminal_a_table_is_drawn_with_names_as_text() -> None:
    text = _drawn(color_system="truecolor")
    assert "5/20 units" in text
    assert "1,000 tokens/s" in text
    assert "about 15 min 00 s left" in text
    assert "ok 4  rejected 1  running 2" in text
    assert "worker 0: [red]x<U+001B>[31m<U+202E>" in text
    assert "worker 1: idle" in text
    assert '"event"' not in text


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = re.compile(r"\x1b\[[0-9;]*(3[0-9]|9[0-7]|4[0-9])[0-9;]*m")
    assert coloured.search(_drawn(color_system="truecolor"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured.search(_drawn(color_system="truecolor"))


def test_a_fault_inside_the_block_passes_and_the_last_state_is_still_said() -> None:
    file = io.StringIO()
    progress = SweepProgress(3, console=Console(file=file))

    def sweep() -> None:
        with progress:
            progress.update({"ok": 1, "running": 2}, 10, ["a", "b"])
            raise KeyError("gone")

    with pytest.raises(KeyError):
        sweep()
    last = _lines(file)[-1]
    assert last["done"] == 1
    assert last["states"] == {"ok": 1, "running": 0}, "nothing runs on"

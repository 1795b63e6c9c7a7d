"""Who writes a file beside its target tidies up after killed writers, and touches nothing else."""

import fcntl
import os
from pathlib import Path

from ray_auditor.durable_file import put_file


def test_only_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    target, digits = tmp_path / "plan.json", "0123456789abcdef"
    others = [".plan.json.swp", ".plan.json.bak", f".plan.json.{digits * 2}0", f".plan.json.{digits}"]
    for name in others:
        (tmp_path / name).write_bytes(b"an editor's")
    folder, link, pipe = (tmp_path / f".plan.json.{digits}{digit * 16}" for digit in "123")
    folder.mkdir()
    link.symlink_to(others[0])
    os.mkfifo(pipe)
    left, living = (tmp_path / f".plan.json.{digits}{digit * 16}" for digit in "45")
    left.write_bytes(b"half")
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert put_file(target, b"whole", replace=True)
    assert target.read_bytes() == b"whole"
    names = {target.name, *others, *(path.name for path in (folder, link, pipe, living))}
    assert {path.name for path in tmp_path.iterdir()} == names

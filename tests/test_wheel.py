"""The wheel: it holds the settings, the kernels and the demo, and runs from a fresh place."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_an_installed_wheel_runs_from_anywhere(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "ray_auditor/conf/config.yaml",
        "ray_auditor/conf/engine/cpu.yaml",
        "auditor_kernels/__init__.py",
        "ray_auditor/report/template.html.j2",
        "ray_auditor/demo/hub/labels.json",
        "ray_auditor/demo/suites/general.jsonl",
    ):
        assert name in names
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    script = (
        "import ray_auditor, auditor_kernels; print(ray_auditor.__file__); print(auditor_kernels.__file__)"
    )
    where = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert all(line.startswith(str(site)) for line in where.stdout.splitlines()), where.stdout
    done = subprocess.run(
        [sys.executable, "-m", "ray_auditor", "sweep", "sae.k=7", "--cfg", "job"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "  k: 7" in done.stdout


def test_transformers_still_imports_beside_our_kernels() -> None:
    subprocess.run(
        [sys.executable, "-c", "import auditor_kernels; from transformers import AutoModelForCausalLM"],
        check=True,
        cwd=ROOT / "kernels",
    )

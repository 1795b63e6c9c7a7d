"""The verb `doctor`: what of this machine an audit depends on, a line each, with its remedy."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ray_auditor.config import AuditConfig

FLOORS = {"ray": (2, 56), "torch": (2, 11), "transformers": (5, 10), "pyarrow": (26, 0), "sae-lens": (6, 54)}
VLLM_FLOOR = (0, 26)
MIN_FREE_BYTES = 2 << 30
EXIT_NOT_READY = 2


class Check(NamedTuple):
    """One line of the doctor."""

    what: str
    ok: bool
    found: str
    remedy: str


def run_doctor(config: AuditConfig) -> int:
    """Print every check.

    Returns:
        0 when all hold, 2 otherwise.
    """
    console = Console()
    checks = [check for group in (_versions, _engine, _kernels, _machine) for check in group(config)]
    for check in checks:
        console.print("[green]ok   [/]" if check.ok else "[red]wrong[/]", end=" ")
        line = f"{check.what}: {check.found}" + ("" if check.ok else f"; {check.remedy}")
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if all(check.ok for check in checks) else EXIT_NOT_READY


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def _versions(_: AuditConfig) -> Iterator[Check]:
    yield Check("python", sys.version_info >= (3, 11), sys.version.split()[0], "use Python 3.11 or later")
    for name, floor in FLOORS.items():
        wanted = f"install {name}>={'.'.join(map(str, floor))}"
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check(name, False, "not installed", wanted)
        else:
            yield Check(
                name, _numbers(found) >= floor, found, f"{wanted}: earlier ones have known holes or bugs"
            )


def _engine(_: AuditConfig) -> Iterator[Check]:
    import torch

    from ray_auditor.plan import engine_version

    try:
        found = engine_version()
    except ValueError as error:
        yield Check("vllm", False, "not installed", str(error))
    else:
        yield Check(
            "vllm", _numbers(found) >= VLLM_FLOOR, found, "install ray-auditor[cpu] or ray-auditor[gpu]"
        )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Check("gpu", True, ", ".join(gpus) or "none: sweeps run on the CPU", "")


def _kernels(config: AuditConfig) -> Iterator[Check]:
    """What `encode_topk` would run on this machine, at the shape of a mid-sized SAE."""
    import torch
    from auditor_kernels import EncoderWeights, describe_dispatch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    d_in, d_sae = 512, 4096
    encoder = EncoderWeights(
        W_enc_DF=torch.zeros(d_sae, d_in, dtype=dtype, device=device).T,
        b_enc_F=torch.zeros(d_sae, device=device),
        threshold_F=torch.zeros(d_sae, device=device),
        b_dec_D=torch.zeros(d_in, device=device),
        W_dec_FD=None,
        max_active=None,
    )
    for line in describe_dispatch(
        encoder, k=config.sae.k, num_tokens=config.engine.max_step_tokens, dtype=dtype
    ):
        yield Check("kernel", True, line, "")


def _machine(config: AuditConfig) -> Iterator[Check]:
    folder = Path(config.out_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    enough = free >= MIN_FREE_BYTES
    yield Check(f"disk at {folder}", enough, f"{free >> 20} MiB free", "free 2 GiB, or set out_dir elsewhere")
    yield Check(
        "out_dir",
        os.access(folder, os.W_OK),
        "writable" if os.access(folder, os.W_OK) else "read-only",
        "set out_dir to a folder you can write",
    )
    yield Check("assertions", __debug__, "on" if __debug__ else "off", "run without python -O")

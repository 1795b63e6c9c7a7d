"""The verb `doctor`: what of this machine an audit depends on, a line each, with its remedy."""

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from rich.console import Console

from ray_auditor.candidates_config import Source
from ray_auditor.config import AuditConfig
from ray_auditor.dashboard import PORT, REMEDY, is_loopback, probe_dashboard
from ray_auditor.hub.endpoint import default_url

EXIT_NOT_READY = 2
MIN_FREE_BYTES = 2 << 30


class Floor(NamedTuple):
    """The oldest version of a package, and what lies below it."""

    package: str
    version: tuple[int, ...]
    why: str


FLOORS = (
    Floor("ray", (2, 56), "pickles in data sets (CVE-2026-41486, CVE-2026-57516), jobs sent by a web page"),
    Floor("torch", (2, 11), "weights_only loads that run code (CVE-2025-32434, CVE-2026-24747)"),
    Floor(
        "transformers",
        (5, 10),
        "code from configs (CVE-2026-5241), files from template names (CVE-2026-9856)",
    ),
    Floor("pyarrow", (26, 0), "files that run code when they are read (CVE-2023-47248)"),
    Floor("safetensors", (0, 8), "headers that its parser and ours would read differently"),
    Floor("jinja2", (3, 1, 6), "templates that leave their sandbox (CVE-2025-27516)"),
    Floor("sae-lens", (6, 54), "SAEs whose fields the reader does not know"),
)
# Rendering templates of strangers was fixed in 0.32 only; it is given none.
VLLM_FLOOR = Floor("vllm", (0, 26), "code from configs (CVE-2026-22807, CVE-2026-27893, CVE-2026-41523)")


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
    groups = (_versions, _engine, _kernels, _machine, _store, _ray, _hub)
    checks = [check for group in groups for check in group(config)]
    for check in checks:
        console.print("[green]ok   [/]" if check.ok else "[red]wrong[/]", end=" ")
        line = f"{check.what}: {check.found}" + ("" if check.ok else f"; {check.remedy}")
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if all(check.ok for check in checks) else EXIT_NOT_READY


def check_version(floor: Floor, found: str | None) -> Check:
    """Hold an installed version to its floor; None: it is not installed."""
    wanted = f"install {floor.package}>={'.'.join(map(str, floor.version))}"
    if found is None:
        return Check(floor.package, False, "not installed", wanted)
    return Check(floor.package, _numbers(found) >= floor.version, found, f"{wanted}; below it: {floor.why}")


def _numbers(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: (2, 13, 0) for `2.13.0+cpu`."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _versions(_: AuditConfig) -> Iterator[Check]:
    yield Check("python", sys.version_info >= (3, 11), sys.version.split()[0], "use Python 3.11 or later")
    for floor in FLOORS:
        try:
            yield check_version(floor, version(floor.package))
        except PackageNotFoundError:
            yield check_version(floor, None)


def _engine(config: AuditConfig) -> Iterator[Check]:
    import torch

    from ray_auditor.engine_class import engine_version

    try:
        yield check_version(VLLM_FLOOR, engine_version())
    except ValueError as error:
        yield Check("vllm", False, "not installed", str(error))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    wanted = config.cluster.gpus_per_worker * config.cluster.num_workers
    enough = config.cluster.address is not None or wanted <= len(gpus)
    found = ", ".join(gpus) or "none: sweeps run on the CPU"
    remedy = f"the cluster's settings ask for {wanted:g}; set cluster.gpus_per_worker=0 for none"
    yield Check("gpu", enough, found, remedy)


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


def _existing(path: str | Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def _machine(config: AuditConfig) -> Iterator[Check]:
    yield Check("assertions", __debug__, "on" if __debug__ else "off", "run without python -O")
    needs = [(_existing(config.out_dir), MIN_FREE_BYTES, "out_dir")]
    if config.candidates.source is not Source.folder:
        cache = config.download.cache_dir or Path(config.out_dir) / "cache"
        needs.append((_existing(cache), config.download.min_free_bytes, "download.cache_dir"))
    for folder, least, setting in needs:
        free = shutil.disk_usage(folder).free
        remedy = f"free {least >> 20} MiB, or set {setting} elsewhere"
        yield Check(f"disk at {folder}", free >= least, f"{free >> 20} MiB free", remedy)


def _store(config: AuditConfig) -> Iterator[Check]:
    """Whether a file can be put where none is, and only there: what a commit is."""
    folder = _existing(config.out_dir)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "read-only" if folder.is_dir() else "a file"
        yield Check("out_dir", False, what, "set out_dir to a folder you can write")
        return
    yield Check("out_dir", True, "writable", "")
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
        first, second = Path(name) / "first", Path(name) / "second"
        first.write_text("")
        try:
            os.link(first, second)
        except OSError as error:
            remedy = "set out_dir to a filesystem with hard links, such as a local disk or NFS"
            yield Check("commits", False, f"no hard links ({error.strerror})", remedy)
            return
        try:
            os.link(first, second)
        except FileExistsError:
            yield Check("commits", True, "a second writer is refused", "")
        else:
            remedy = "set out_dir to another filesystem: here two writers could commit one unit"
            yield Check("commits", False, "a second writer is not refused", remedy)


def _ray(config: AuditConfig) -> Iterator[Check]:
    hosts = {"127.0.0.1", socket.gethostname()}
    address = config.cluster.address
    if address is not None and address not in ("auto", "local"):
        host = urlsplit(address if "://" in address else f"ray://{address}").hostname
        hosts = {host} if host else hosts
    yield check_dashboard({host: probe_dashboard(host) for host in sorted(hosts)})


def check_dashboard(found: Mapping[str, str]) -> Check:
    """Judge what `probe_dashboard` found, by host: who reaches one without a token runs code there."""
    exposed = [host for host, said in found.items() if said == "open" and not is_loopback(host)]
    if exposed:
        return Check(
            "ray dashboard",
            False,
            f"open to others at {exposed[0]}:{PORT}, without a token",
            REMEDY,
        )
    if "open" in found.values():
        return Check("ray dashboard", True, "open to this machine alone, without a token", "")
    return Check(
        "ray dashboard", True, "asks for a token" if "token" in found.values() else "none answers", ""
    )


def _hub(config: AuditConfig) -> Iterator[Check]:
    """Where candidates would come from; the token itself is never shown."""
    url, has_token = default_url(), get_token() is not None
    parts = urlsplit(url)
    in_clear = parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1")
    yield Check(
        "hub",
        not (in_clear and has_token),
        f"{parts.scheme}://{parts.hostname}, {'a token is set' if has_token else 'no token'}",
        "set HF_ENDPOINT to an https address: the token would travel in clear",
    )
    reads_hub = config.candidates.source in (Source.hub, Source.manifest)
    offline = bool(constants.HF_HUB_OFFLINE)
    yield Check(
        "offline mode",
        not (reads_hub and offline),
        "on" if offline else "off",
        f"unset HF_HUB_OFFLINE: candidates={config.candidates.source.value} is read from the hub",
    )

"""The Hopper filter: built with nvcc on first use and cached; silently absent where it cannot be."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from auditor_kernels.launch import Launcher

SOURCE = Path(__file__).with_name("hopper_filter.cu")
ARCH = "90a"
BUILD_SECONDS = 600


def wgmma_header() -> str:
    """The wgmma wrappers: 128 accumulators are operands, which no one should write by hand."""
    registers = ", ".join(f"%{i}" for i in range(128))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(128))
    wrapper = (
        "__device__ __forceinline__ void wgmma_{name}(float (&d)[128], uint64_t x, uint64_t w, int keep) {{\n"
        '  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %130, 0;\\n"\n'
        '  "wgmma.mma_async.sync.aligned.m64n256k16.f32.{name}.{name} "\n'
        '  "{{{registers}}}, %128, %129, p, 1, 1, 0, 0;\\n}}\\n"\n'
        '  : {outputs} : "l"(x), "l"(w), "r"(keep));\n}}\n'
    )
    return "".join(
        wrapper.format(name=name, registers=registers, outputs=outputs) for name in ("bf16", "f16")
    )


def find_nvcc() -> str | None:
    """The CUDA compiler, from PATH, CUDA_HOME or the usual place."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def cache_dir() -> Path:
    """Where built libraries are kept: `$XDG_CACHE_HOME/auditor_kernels`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auditor_kernels"


def build(nvcc: str, folder: Path) -> Path:
    """Compile unless this very source was compiled before; the file appears whole or not at all.

    Raises:
        RuntimeError: nvcc failed, with what it said.
    """
    header = wgmma_header()
    key = hashlib.sha256((SOURCE.read_text() + header + ARCH).encode()).hexdigest()[:16]
    library = folder / f"hopper_filter_{ARCH}_{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        Path(scratch, "wgmma.inc").write_text(header)
        built = Path(scratch, library.name)
        command = [nvcc, "-O3", "-std=c++17", f"-gencode=arch=compute_{ARCH},code=sm_{ARCH}", f"-I{scratch}"]
        command += ["-Xcompiler", "-fPIC", "-shared", "-o", str(built), str(SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"nvcc failed ({result.returncode}): {result.stderr.strip()[-400:]}")
        built.replace(library)
    return library


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why there is none."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None, "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
    try:
        return ctypes.CDLL(str(build(nvcc, cache_dir()))), f"built by {nvcc}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return None, str(error)


def filter_pass(launcher: Launcher, part: slice, floor: Tensor, count: Tensor, cand: Tensor) -> None:
    """Run the filter over one chunk; same contract as `Launcher.gemm` with the filter.

    Raises:
        ValueError: forced on a dtype or an encoder that it does not take.
        RuntimeError: there is no library, or the launch failed.
    """
    prepared, x_td = launcher.prepared, launcher.x_ND[part]
    if x_td.dtype == torch.float32 or prepared.two_sided:
        raise ValueError(
            f"the Hopper filter takes 16-bit residuals and one-sided encoders, got {x_td.dtype}, "
            f"two_sided={prepared.two_sided}; unset AUDITOR_KERNELS"
        )
    library, reason = load()
    if library is None:
        raise RuntimeError(f"there is no Hopper filter: {reason}; unset AUDITOR_KERNELS")
    pointer = ctypes.c_void_p
    status = library.auditor_filter(
        pointer(x_td.data_ptr()),
        pointer(prepared.w_FD.data_ptr()),
        pointer(prepared.bias_F.data_ptr()),
        pointer(prepared.threshold_F.data_ptr() if prepared.has_threshold else 0),
        pointer(floor.data_ptr()),
        pointer(count.data_ptr()),
        pointer(cand.data_ptr()),
        launcher.cap,
        x_td.shape[0],
        launcher.d_sae,
        launcher.width,
        int(x_td.dtype == torch.float16),
        launcher.tiles.programs,
        pointer(torch.cuda.current_stream(x_td.device).cuda_stream),
    )
    if status != 0:
        raise RuntimeError(
            f"the Hopper filter failed to launch (code {status}); set AUDITOR_KERNELS=triton-filter"
        )

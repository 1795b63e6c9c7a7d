"""The Hopper filter: built with nvcc on first use and cached; silently absent where it cannot be."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from auditor_kernels.launch import Launcher
from auditor_kernels.prepared import Prepared

if TYPE_CHECKING:
    from auditor_kernels.int8_rounding import Rounded, Screen

SOURCE = Path(__file__).with_name("hopper_filter.cu")
WRAPPERS = SOURCE.with_name("hopper_ptx.cuh")
ARCH = "90a"
BUILD_SECONDS = 600


# Name, type and depth in PTX, what follows the operands, and the accumulators' constraint and type.
WGMMA = (
    ("bf16", "k16.f32.bf16.bf16", ", 1, 1, 0, 0", "f", "float"),
    ("f16", "k16.f32.f16.f16", ", 1, 1, 0, 0", "f", "float"),
    ("s8", "k32.s32.s8.s8", "", "r", "int"),
)


def wgmma_header() -> str:
    """The wgmma wrappers: 128 accumulators are operands, which no one should write by hand."""
    registers = ", ".join(f"%{i}" for i in range(128))
    header = ""
    for name, kind, tail, constraint, number in WGMMA:
        outputs = ", ".join(f'"+{constraint}"(d[{i}])' for i in range(128))
        header += (
            f"__device__ __forceinline__ void wgmma_{name}("
            f"{number} (&d)[128], uint64_t x, uint64_t w, int keep) {{\n"
            '  asm volatile("{\\n.reg .pred p;\\nsetp.ne.b32 p, %130, 0;\\n"\n'
            f'  "wgmma.mma_async.sync.aligned.m64n256{kind} "\n'
            f'  "{{{registers}}}, %128, %129, p{tail};\\n}}\\n"\n'
            f'  : {outputs} : "l"(x), "l"(w), "r"(keep));\n}}\n'
        )
    return header


def find_nvcc() -> str | None:
    """The CUDA compiler, from PATH, CUDA_HOME or the usual place."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def cache_dir() -> Path:
    """Where built libraries are kept: `$XDG_CACHE_HOME/auditor_kernels`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auditor_kernels"


def compile_command(nvcc: str, headers: Path, output: Path) -> list[str]:
    """How the library is compiled; `headers` holds `wgmma.inc`."""
    command = [nvcc, "-O3", "-std=c++17", f"-gencode=arch=compute_{ARCH},code=sm_{ARCH}"]
    command += [f"-I{headers}", f"-I{SOURCE.parent}", "-Xcompiler", "-fPIC", "-shared"]
    return [*command, "-o", str(output), str(SOURCE)]


def build(nvcc: str, folder: Path) -> Path:
    """Compile unless this very source was compiled before; the file appears whole or not at all.

    Raises:
        RuntimeError: nvcc failed, with what it said.
    """
    header = wgmma_header()
    text = SOURCE.read_text() + WRAPPERS.read_text() + header + ARCH
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    library = folder / f"hopper_filter_{ARCH}_{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        Path(scratch, "wgmma.inc").write_text(header)
        built = Path(scratch, library.name)
        command = compile_command(nvcc, Path(scratch), built)
        code, said = _run(command)
        if code != 0:
            raise RuntimeError(f"nvcc failed ({code}): {said.strip()[-400:]}")
        built.replace(library)
    return library


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code and output; a command that is given up, or interrupted, leaves none of its own behind."""
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = running.communicate(timeout=BUILD_SECONDS)
    except BaseException:
        os.killpg(running.pid, signal.SIGKILL)  # what it started holds the pipe as well
        running.communicate()
        raise
    return running.returncode, said


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


def check_takes(prepared: Prepared, x_TD: Tensor) -> None:
    """Refuse what the Hopper filters do not take.

    Raises:
        ValueError: the dtype is float32, or the encoder two-sided.
    """
    if x_TD.dtype == torch.float32 or prepared.two_sided:
        raise ValueError(
            f"the Hopper filter takes 16-bit residuals and one-sided encoders, got {x_TD.dtype}, "
            f"two_sided={prepared.two_sided}; unset AUDITOR_KERNELS"
        )


def _call(name: str, *arguments: Tensor | float | None) -> None:
    """Call into the library on the current stream: tensors become pointers, None a null one.

    Raises:
        RuntimeError: there is no library, or the launch failed.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(f"there is no Hopper filter: {reason}; unset AUDITOR_KERNELS")
    values: list[object] = []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            values.append(ctypes.c_void_p(0 if argument is None else argument.data_ptr()))
        else:
            values.append(ctypes.c_float(argument) if isinstance(argument, float) else argument)
    status = getattr(library, name)(*values, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    if status != 0:
        raise RuntimeError(
            f"the Hopper filter failed to launch (code {status}); set AUDITOR_KERNELS=triton-filter"
        )


def filter_pass(launcher: Launcher, part: slice, floor: Tensor, count: Tensor, cand: Tensor) -> None:
    """Run the filter over one chunk; same contract as `Launcher.gemm`.

    Raises:
        ValueError: forced on a dtype or an encoder that it does not take.
        RuntimeError: there is no library, or the launch failed.
    """
    prepared, x_td = launcher.prepared, launcher.x_ND[part]
    check_takes(prepared, x_td)
    threshold = prepared.threshold_F if prepared.has_threshold else None
    sizes = (launcher.cap, len(x_td), launcher.d_sae, launcher.width)
    is_fp16 = int(x_td.dtype == torch.float16)
    vectors = (prepared.bias_F, threshold, floor, count, cand)
    _call("auditor_filter", x_td, prepared.w_FD, *vectors, *sizes, is_fp16, launcher.tiles.programs)


def filter_int8(
    launcher: Launcher,
    screen: Screen,
    x: Rounded,
    coins: float,
    sums: float,
    floor: Tensor,
    count: Tensor,
    cand: Tensor,
) -> None:
    """The filter over rows rounded to int8: scores, not exact, of all that the bound does not exclude.

    Raises:
        RuntimeError: there is no library, or the launch failed.
    """
    tokens, depth = x.q.shape
    bounds = (x.scalars, screen.tiles, coins, sums, floor, count, cand)
    sizes = (launcher.cap, tokens, launcher.d_sae, depth, launcher.tiles.programs)
    _call("auditor_filter_int8", x.q, screen.q_FE, launcher.prepared.bias_F, screen.step_F, *bounds, *sizes)

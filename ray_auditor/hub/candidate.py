"""The nouns of the hub: what a stranger's folder becomes once it is trusted, and the error when it is not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["adapter", "full"]
RefusalStatus = Literal["rejected", "skipped", "deferred", "failed", "screened"]
Start = Literal["base", "pissa", "olora"]

MAX_TEXT_CHARS = 400


class CandidateError(Exception):
    """A candidate that cannot be audited, for a reason that lies in its repository.

    The text may quote the repository, so it is reduced to short printable ASCII: it ends in logs and reports.

    Attributes:
        status: `rejected` (the input is at fault), `skipped` (sound, but nothing this auditor audits),
            `deferred` (may be whole the next time it is looked at), `failed` (its bytes did not come) or
            `screened` (scored low on some of the prompts, so that the others did not run).
        code: Short slug, such as `wrong_base`.
        text: One sentence with the field, the value and the bound.
    """

    def __init__(self, status: RefusalStatus, code: str, text: str) -> None:
        super().__init__(status, code, text)  # the arguments travel between processes by pickle
        self.status: RefusalStatus = status
        self.code = code
        self.text = printable(text, MAX_TEXT_CHARS)

    @property
    def reason(self) -> str:
        """`status:code: text`, as it is written in the summary."""
        return f"{self.status}:{self.code}: {self.text}"

    def __str__(self) -> str:
        return self.reason


def printable(text: str, max_chars: int) -> str:
    """`text` in printable ASCII of at most `max_chars` characters, everything else escaped."""
    ascii_text = text.encode("ascii", "backslashreplace").decode("ascii")
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in ascii_text)
    return safe if len(safe) <= max_chars else safe[: max_chars - 3] + "..."


@dataclass(frozen=True)
class Candidate:
    """One finetune as it was found: nothing in it has been read yet."""

    id: str  # [A-Za-z0-9._-], safe as a file name
    path: Path
    kind: Kind
    num_bytes: int  # of its safetensors files: what the driver orders the queue by


@dataclass(frozen=True)
class Refused:
    """A sub-folder that is no candidate; `reason` reads `status:code: text`."""

    id: str
    status: RefusalStatus
    reason: str


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file at the time it was admitted; reading it later checks that it is still the same one."""

    path: Path
    num_bytes: int
    inode: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor lies: `file[start:end]`, contiguous, little endian, row major."""

    dtype: str  # safetensors' name: F64, F32, F16, BF16, ...
    shape: tuple[int, ...]
    file: WeightFile
    start: int  # bytes from the start of the file
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in its file."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """One of the base's tensors as an adapter changes it; `checkpoint.iter_tensors` computes it, in fp32.

    W + scaling * B A, where W is the base's tensor less what `start` names; with a magnitude, every row of
    that is scaled to have it as its norm. A bias gains scaling * `added`.
    """

    base: TensorSpec
    added: TensorSpec  # lora_B [out, rank]; or, without `lora_A`, what is added as it is
    lora_A: TensorSpec | None  # [rank, in]
    scaling: float
    magnitude: TensorSpec | None  # [out]: the norm every row has in the end (DoRA)
    start: Start  # what training had taken out of `base` before it began

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base's tensor."""
        return self.base.shape

    @property
    def num_bytes(self) -> int:
        """Bytes that are read to compute it."""
        parts = (self.base, self.added, self.lora_A, self.magnitude)
        return sum(part.num_bytes for part in parts if part is not None)


TensorSource = TensorSpec | MergedTensor
"""Where a tensor comes from: bytes of one file, or those of several that are computed with."""


@dataclass(frozen=True)
class BaseModel:
    """The model every candidate is compared with."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    content_sha256: str  # of the tensors that are read; equals a candidate's when their bytes are the same
    key: str  # sha256 hex over content_sha256 and the config fields that change the computation


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted linear layer: its output gains `scaling * B @ A @ x`."""

    rank: int
    scaling: float  # alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA
    lora_A: str  # name in `Admitted.tensors` of the [rank, in_features] matrix
    lora_B: str  # name in `Admitted.tensors` of the [out_features, rank] matrix


@dataclass(frozen=True)
class LoraSpec:
    """All an engine needs to apply an adapter, and to prove that it did, without the repository's config."""

    rank: int  # largest over modules; 0 when nothing lies at or below the hook
    modules: dict[str, LoraModule]  # by module name in the base: model.layers.0.self_attn.q_proj


@dataclass(frozen=True)
class Admitted:
    """A candidate whose files may be read.

    `tensors` holds what the audit reads and nothing else, under the names of the files: the base's own names
    for full weights and for an adapter that is merged into them, `base_model.model.*` for any other adapter.
    """

    candidate: Candidate
    content_sha256: str  # over what is read only: the same bytes under another id share it
    tensors: dict[str, TensorSource]
    lora: LoraSpec | None  # None for full weights, and for what is merged into them
    notes: tuple[str, ...]
    declared_base: str | None = None  # what an adapter says it was trained on; a claim, never resolved

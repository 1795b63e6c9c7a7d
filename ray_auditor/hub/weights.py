"""Which tensors a folder of full weights holds, and which of them lie at or below the hook."""

import re
from pathlib import Path

from ray_auditor.hub.candidate import CandidateError, TensorSpec
from ray_auditor.hub.config_json import read_object
from ray_auditor.hub.folder import locate
from ray_auditor.hub.header import read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 1000

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_SHARD_NAME = re.compile(r".*-of-(\d{5})\.safetensors")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_ABOVE_EVERY_LAYER = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|score|norm|ln_f|final_layer_norm)\.(?:weight|bias)"
)
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)\.weight")
_QUANTIZED = re.compile(
    r".*\.(?:qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|SCB|absmax|quant_map|nested_absmax"
    r"|quant_state\..*)"
)


def read_weights(folder: Path, names: list[str]) -> dict[str, TensorSpec]:
    """Tensors of a folder of full weights, by name.

    Args:
        folder: An untrusted folder.
        names: Its entries, as `folder.list_names` gives them.

    Raises:
        CandidateError: a shard or tensor that is missing or there twice, an index that points out of the
            folder or disagrees with the shards, quantised weights, or an unsound header.
    """
    weight_map = _read_index(folder) if INDEX_NAME in names else None
    files = sorted(set(weight_map.values())) if weight_map is not None else _find_shards(names)
    if weight_map is not None and SINGLE_NAME in names and SINGLE_NAME not in files:
        # Loaders differ in which of the two they take.
        raise CandidateError(
            "rejected", "ambiguous_weights", f"both {SINGLE_NAME} and {INDEX_NAME} name weights"
        )
    tensors: dict[str, TensorSpec] = {}
    for name in files:
        if name not in names:
            raise CandidateError("rejected", "missing_shard", f"{name} is named by the index and not there")
        header = read_header(folder / name)
        if twice := sorted(header.keys() & tensors.keys()):
            raise CandidateError(
                "rejected", "duplicate_tensor", f"{twice[0]} is in {name} and in another shard"
            )
        tensors |= header
    for name, spec in tensors.items():
        if spec.dtype.startswith(("F8_", "F6_", "F4")) or _QUANTIZED.fullmatch(name):
            raise CandidateError(
                "skipped", "quantized", f"{name} ({spec.dtype}) belongs to quantised weights"
            )
    for tensor, file in (weight_map or {}).items():
        if tensor not in tensors or tensors[tensor].file.path != locate(folder, file):
            raise CandidateError(
                "rejected", "missing_tensor", f"the index puts {tensor} in {file}; it is not there"
            )
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    index = read_object(folder, INDEX_NAME, max_bytes=MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CandidateError("rejected", "json", f"{INDEX_NAME}: weight_map must map tensors to file names")
    files = set(weight_map.values())
    if not 1 <= len(files) <= MAX_SHARDS:
        raise CandidateError(
            "rejected", "file_bounds", f"weight_map must name 1 to {MAX_SHARDS} files, got {len(files)}"
        )
    for file in sorted(files):
        locate(folder, file)  # before any is opened
        if not file.endswith(".safetensors"):
            raise CandidateError(
                "rejected", "path_traversal", f"weight_map names {file!r}, no safetensors file"
            )
    return weight_map


def _find_shards(names: list[str]) -> list[str]:
    """Weight files without an index: the single one, or every one there is."""
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    shards = {name: int(match[1]) for name in names if (match := _SHARD_NAME.fullmatch(name))}
    for name, num_shards in shards.items():
        if num_shards != len(shards):
            raise CandidateError(
                "rejected", "missing_shard", f"{name} is one of {num_shards} shards, found {len(shards)}"
            )
    return list(shards) or [
        name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")
    ]


def layer_of(name: str) -> int | None:
    """Index of the layer a tensor belongs to; None outside the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def lies_below_hook(name: str, num_layers: int) -> bool:
    """Whether a tensor belongs to the first `num_layers` layers or to what feeds them; the head does not."""
    layer = layer_of(name)
    return layer < num_layers if layer is not None else not _ABOVE_EVERY_LAYER.search(name)


def fit_to_base(
    base: dict[str, TensorSpec], found: dict[str, TensorSpec], num_layers: int
) -> tuple[dict[str, TensorSpec], list[str]]:
    """The candidate's tensors at or below the hook, on the base's skeleton.

    An embedding with more rows than the base's is cut to the base's rows: the base's tokenizer is the one in
    use, so no other row is ever looked up.

    Returns:
        tuple: specs under the base's names in sorted order; and notes.

    Raises:
        CandidateError: `rejected:` with `missing_tensor`, `shape`, `dtype` or `vocab`.
    """
    fitted: dict[str, TensorSpec] = {}
    notes = []
    for name in sorted(name for name in base if lies_below_hook(name, num_layers)):
        want = base[name].shape
        if (spec := found.get(name)) is None:
            raise CandidateError("rejected", "missing_tensor", f"{name} {list(want)} is not in the weights")
        if spec.dtype not in FLOAT_DTYPES:
            raise CandidateError(
                "rejected", "dtype", f"{name} must be one of {sorted(FLOAT_DTYPES)}, got {spec.dtype}"
            )
        if spec.shape != want and _EMBEDDING.search(name) and spec.shape[1:] == want[1:]:
            if spec.shape[0] < want[0]:
                raise CandidateError(
                    "rejected", "vocab", f"{name} has {spec.shape[0]} rows, the base's has {want[0]}"
                )
            notes.append(f"{name} has {spec.shape[0]} rows; the base's {want[0]} are read")
            row_bytes = (spec.end - spec.start) // spec.shape[0]
            spec = TensorSpec(spec.dtype, want, spec.file, spec.start, spec.start + want[0] * row_bytes)
        if spec.shape != want:
            raise CandidateError(
                "rejected", "shape", f"{name} must be {list(want)} as in the base, got {list(spec.shape)}"
            )
        fitted[name] = spec
    extra = sorted(name for name in found.keys() - base.keys() if lies_below_hook(name, num_layers))
    if extra:
        shown = ", ".join(extra[:3]) + (", ..." if extra[3:] else "")
        notes.append(f"{len(extra)} tensors the base does not have were not read: {shown}")
    return fitted, notes

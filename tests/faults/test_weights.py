"""Rows B1 to B14: files of weights."""

import json
import os
import time
from pathlib import Path

import numpy as np
from hub_folders import CONFIG, adapter_tensors, model_tensors, random_tensors, write_raw, write_safetensors
from table import fault
from test_safetensors_header import MALFORMED, entry, rust_accepts

PICKLE = b"cos\nsystem\n(S'touch owned'\ntR."
INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def shard(folder: Path) -> dict[str, str]:
    (folder / "model.safetensors").unlink()
    tensors, weight_map = model_tensors(1), {}
    for number in (1, 2):
        part = sorted(tensors)[number - 1 :: 2]
        file = f"model-{number:05}-of-00002.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def transformed(change) -> dict:
    return {name: change(array) for name, array in model_tensors(0).items()}


@fault("B1", "nothing but pickles", demanded="skipped, never opened", seen="skipped:pickle_only")
def test_B01_pickles(hub, audit_events, seen) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "x.ckpt"):
        folder = hub.root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / name).write_bytes(PICKLE)
    hub.base  # noqa: B018
    events = audit_events()
    for outcome in hub.outcomes().values():
        seen(outcome)
    opened = {Path(str(args[0])).parent for event, args in events if event == "open"}
    assert opened <= {hub.base_path}


@fault(
    "B2",
    "a hostile pickle beside sound weights",
    demanded="noted; the weights are audited",
    seen="ok, not used",
)
def test_B02_pickle_beside(hub, audit_events, seen) -> None:
    (hub.full() / "pytorch_model.bin").write_bytes(PICKLE)
    events = audit_events()
    seen(hub.outcome)
    assert "pytorch_model.bin" not in {Path(str(args[0])).name for event, args in events if event == "open"}
    assert not [event for event, _ in events if event == "pickle.find_class"]


@fault(
    "B3",
    "every malformed header known",
    demanded="rejected; what ours accepts the Rust parser accepts",
    seen="; ".join(f"rejected:{code}" for code in sorted({code for *_, code in MALFORMED.values()})),
)
def test_B03_malformed(hub, seen) -> None:
    for i, (header, num_body_bytes, _) in enumerate(MALFORMED.values()):
        write_raw(hub.full(f"m{i}") / "model.safetensors", header, bytes(num_body_bytes))
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B4", "a header of 99 MB; 200,000 tensors", demanded="rejected in a second", seen="rejected:header_limits"
)
def test_B04_large_headers(hub, seen) -> None:
    write_raw(hub.full("long") / "model.safetensors", b"{}", length=99 << 20)
    header = {f"t{i}": entry(0, 0, [0]) for i in range(200_000)}
    path = write_raw(hub.full("many") / "model.safetensors", header)
    assert rust_accepts(path)
    base_s = time.process_time()
    hub.base  # noqa: B018
    base_s = time.process_time() - base_s
    begun = time.process_time()
    for outcome in hub.outcomes().values():
        seen(outcome)
    assert time.process_time() - begun - base_s < 1


@fault("B5", "tensor names with paths, NUL, a megabyte", demanded="rejected", seen="rejected:tensor_name")
def test_B05_tensor_names(hub, seen) -> None:
    for i, name in enumerate(("../x", "a/b", "a\x00b", "x" * 1_000_000, "", "é", "a b")):
        write_raw(hub.full(f"m{i}") / "model.safetensors", {name: entry(0, 4)}, bytes(4))
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B6",
    "a tensor in two shards, missing, or of nobody's architecture",
    demanded="rejected, rejected, noted and not read",
    seen="rejected:duplicate_tensor; rejected:missing_tensor; ok, noted",
)
def test_B06_tensor_sets(hub, seen) -> None:
    folder = hub.full("twice")
    shard(folder)
    write_safetensors(folder / "model-00002-of-00002.safetensors", model_tensors(1))
    hub.full("missing", {name: array for name, array in model_tensors(1).items() if name != UP})
    hub.full("extra", model_tensors(1) | {"model.layers.0.evil.weight": np.zeros((3, 3))})
    folder = hub.full("promised")
    write_index(folder, shard(folder) | {"model.layers.9.w": "model-00001-of-00002.safetensors"})
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B7",
    "an index that leads out of the folder, by path or by link",
    demanded="rejected, nothing outside opened",
    seen="rejected:path_traversal; rejected:symlink_escape",
)
def test_B07_traversal(hub, audit_events, seen) -> None:
    outside = (
        "../../base/model.safetensors",
        "/etc/passwd",
        "a/../model.safetensors",
        "..",
        "x\x00",
        "~/x",
        "C:\\x",
    )
    for i, name in enumerate(outside):
        folder = hub.full(f"m{i}")
        write_index(folder, shard(folder) | {UP: name})
    folder = hub.full("linked")
    link = folder / "model-00009-of-00009.safetensors"
    write_index(folder, shard(folder) | {UP: link.name})
    link.symlink_to(hub.base_path / "model.safetensors")
    events = audit_events()
    for outcome in hub.outcomes().values():
        seen(outcome)
    opened = {Path(str(args[0])).parent for event, args in events if event == "open"}
    assert opened <= {hub.base_path, *hub.root.iterdir()}


@fault(
    "B8",
    "an index of a gigabyte, nested without end, with NaN, doubled keys, a byte order mark, UTF-16",
    demanded="rejected by bounds before it is parsed",
    seen="rejected:json; rejected:file_bounds",
)
def test_B08_json(hub, seen) -> None:
    raw = [
        b'{"weight_map": {}, "a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        b'{"weight_map": {"a": NaN}}',
        b'{"weight_map": {"a": "x"}, "weight_map": {}}',
        b'\xef\xbb\xbf{"weight_map": {}}',
        '{"weight_map": {}}'.encode("utf-16"),
        b'{"weight_map": {"a": 1' + b"0" * 5000 + b"}}",
    ]
    for i, index in enumerate(raw):
        folder = hub.full(f"m{i}")
        shard(folder)
        (folder / INDEX).write_bytes(index)
    folder = hub.full("gigabyte")
    shard(folder)
    os.truncate(folder / INDEX, 1 << 30)
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault("B9", "a shard is missing", demanded="rejected", seen="rejected:missing_shard")
def test_B09_missing_shard(hub, seen) -> None:
    for name in ("indexed", "bare"):
        folder = hub.full(name)
        shard(folder)
        (folder / "model-00002-of-00002.safetensors").unlink()
        if name == "bare":
            (folder / INDEX).unlink()
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B10",
    "float16 bytes under a bfloat16 label",
    demanded="flagged:qa_weights, no verdict of the SAE",
    seen="rejected:qa_weights",
    why="no number of such a model means anything, so it is refused before it runs",
)
def test_B10_dtype_lie(hub, seen) -> None:
    hub.full("lie", transformed(lambda array: ("BF16", (0.3 * array).astype("<f2").view("<u2"))))
    seen(hub.outcome)


@fault(
    "B11",
    "quantised weights, by config, tensors or file kind",
    demanded="skipped by name",
    seen="skipped:quantized",
)
def test_B11_quantised(hub, seen) -> None:
    hub.full("gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    hub.full("fp8", model_tensors(1) | {UP: ("F8_E4M3", np.zeros((12, 8)))})
    hub.full("awq", model_tensors(1) | {"model.layers.0.mlp.up_proj.qweight": ("I32", np.zeros((12, 8)))})
    hub.full("bnb", model_tensors(1) | {f"{UP}.absmax": np.zeros(12)})
    (hub.root / "gguf").mkdir()
    (hub.root / "gguf/model.Q4_K_M.gguf").write_bytes(b"GGUF")
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B12",
    "NaN or infinite weights, one or all",
    demanded="flagged, no silent fill",
    seen="rejected:nonfinite_weights",
    why="refused before they run; activations that overflow are refused by the worker (tests/test_sweep.py)",
)
def test_B12_nonfinite(hub, seen) -> None:
    one = model_tensors(1)
    one[UP][3, 3] = np.nan
    hub.full("one", one)
    hub.full("all", transformed(lambda array: np.full_like(array, np.inf)))
    adapter = adapter_tensors(1)
    next(iter(adapter.values()))[0, 0] = -np.inf
    hub.adapter("adapter", adapter)
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B13",
    "weights that are zero, constant, shuffled, or noise",
    demanded="flagged as degenerate",
    seen="rejected:qa_weights; rejected:wrong_base",
    why="told from a finetune by a few MiB of numbers, so refused before they run",
)
def test_B13_degenerate(hub, seen) -> None:
    rng = np.random.default_rng(7)
    hub.full("zero", transformed(np.zeros_like))
    hub.full("constant", transformed(lambda array: np.full_like(array, 0.5)))
    hub.full("shuffled", transformed(lambda array: rng.permutation(array.ravel()).reshape(array.shape)))
    hub.full("noise", random_tensors(9))
    for outcome in hub.outcomes().values():
        seen(outcome)


@fault(
    "B14",
    "another number of rows in the embedding; another head",
    demanded="more are cut and noted, fewer rejected",
    seen="ok, noted; rejected:vocab",
)
def test_B14_vocabulary(hub, seen) -> None:
    name = "model.embed_tokens.weight"
    tensors = model_tensors(1)
    for rows in (18, 20, 9):
        resized = np.resize(tensors[name], (rows, 8))
        hub.full(f"rows{rows}", tensors | {name: resized}, vocab_size=rows)
    head = {"lm_head.weight": np.ones((10, 8))}
    hub.full("untied", tensors | head, tie_word_embeddings=False)
    for outcome in hub.outcomes().values():
        seen(outcome)

"""Mutated files for admission: a case is its number, and the same number makes the same file."""

import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from ray_auditor.hub import BaseModel, Candidate, CandidateError, WeightFile, admit, open_base
from ray_auditor.hub.header import parse_header
from ray_auditor.hub.weights import read_weights

KINDS = ("header", "index", "config", "adapter")
INDEX = "model.safetensors.index.json"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "vocab_size": 10, "max_position_embeddings": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-05, "attention_bias": False,
    "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}, "tie_word_embeddings": True,
    "layer_types": ["full_attention"], "sliding_window": None, "rope_theta": 1e5,
}  # fmt: skip
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"],
    "base_model_name_or_path": "org/base", "bias": "none", "use_rslora": False, "use_dora": False,
    "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "modules_to_save": None,
    "megatron_core": "megatron.core", "auto_mapping": None, "init_lora_weights": True,
}  # fmt: skip
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
Q = "model.layers.0.self_attn.q_proj"
SHAPES = {
    "model.embed_tokens.weight": (10, 8),
    f"{Q}.weight": (8, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.input_layernorm.weight": (8,),
}
LORA = {f"base_model.model.{Q}.lora_A.weight": (2, 8), f"base_model.model.{Q}.lora_B.weight": (8, 2)}

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 8, 10**9, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30, 0.5, -0.0, 1e-300,
    1e308, float("inf"), float("nan"), "", "x", "../x", "/etc/passwd", "a/../b", "\x00", "\ud800", "é",
    "(a+)+$", "x" * 300, "F32", "F4", "BF16", "all-linear", "LORA", "linear", "model.safetensors",
    [], {}, [[]], [0, 8],
    [8, 0], [-1, 4], [0, 1 << 62], ["q_proj"] * 50, {"a": {"b": {}}}, {"": 1}, "os.system", "__metadata__",
)  # fmt: skip
BYTES = (
    b"",
    b"0",
    b"9",
    b"-",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b" ",
    b"\xff",
    b"1e9",
    b"NaN",
    b"null",
)


@dataclass
class Tally:
    """What a range of cases came to."""

    outcomes: Counter[str] = field(default_factory=Counter)  # `kind accepted`, `kind refused`
    codes: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)


_opened: list[str] | None = None


def watch(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: an open, a listing, a process or a connection, by its path."""
    if _opened is None:
        return
    if event in ("open", "os.scandir", "os.listdir"):
        if not isinstance(args[0], int):
            _opened.append(os.fsdecode(args[0]))
    elif event in ("exec", "compile", "subprocess.Popen", "os.system", "socket.connect", "pickle.find_class"):
        _opened.append(f"!{event}")


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> bytes:
    """Small noise on fixed numbers under these names; returns the header."""
    fixed, noise = np.random.default_rng(0), np.random.default_rng(seed)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, shape in shapes.items():
        data = fixed.standard_normal(shape, np.float32) + 0.05 * noise.standard_normal(shape, np.float32)
        raw = data.astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return text


def alter(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one node replaced, removed, doubled or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        found = dict(value)
        key = rng.choice(list(found))
        choice = rng.random()
        if choice < 0.45:
            found[key] = alter(found[key], rng)
        elif choice < 0.75:
            found[key] = rng.choice(NASTY)
        elif choice < 0.85:
            del found[key]
        else:
            found[str(rng.choice(NASTY))[:400]] = found[key]
        return found
    if isinstance(value, list) and value and rng.random() < 0.7:
        items = list(value)
        at = rng.randrange(len(items))
        items[at : at + rng.randrange(2)] = [alter(items[at], rng), rng.choice(NASTY)][: rng.randrange(3)]
        return items
    if type(value) is int and rng.random() < 0.6:
        return value + rng.choice((-8, -4, -1, 1, 4, 8))
    return rng.choice(NASTY)


def spell(value: Any, rng: random.Random) -> bytes:
    """JSON text of a value; half of the time with bytes changed."""
    raw = bytearray(json.dumps(value).encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice((0, 0, 1, 2, 4))):
        at = rng.randrange(len(raw) + 1)
        piece = rng.choice(BYTES) if rng.random() < 0.8 else bytes([rng.randrange(256)])
        raw[at : at + rng.choice((0, 1, 1, 5))] = piece
    return bytes(raw)


def draw(value: Any, rng: random.Random) -> bytes:
    """A mutant of a sound value."""
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        value = alter(value, rng)
    return spell(value, rng)


class Corpus:
    """Sound files of each kind, of which one is changed per case."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("base", "full", "sharded", "lora"):
            (root / name).mkdir()
        self.header: dict[str, Any] = json.loads(
            write_safetensors(root / "base/model.safetensors", SHAPES, 0)
        )
        write_safetensors(root / "full/model.safetensors", SHAPES, 1)
        names = sorted(SHAPES)
        self.index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
        for number in (1, 2):
            part = names[number - 1 :: 2]
            file = f"model-{number:05}-of-00002.safetensors"
            write_safetensors(root / "sharded" / file, {name: SHAPES[name] for name in part}, 1)
            self.index["weight_map"] |= dict.fromkeys(part, file)
        write_safetensors(root / "lora/adapter_model.safetensors", LORA, 1)
        for name in ("base", "full", "sharded"):
            (root / name / "config.json").write_text(json.dumps(CONFIG))
        self.base: BaseModel = open_base(root / "base", num_layers=1)
        self.full = Candidate("full", root / "full", "full", 1)
        self.lora = Candidate("lora", root / "lora", "adapter", 1)
        self.allowed = {str(root / name) for name in ("base", "full", "sharded", "lora")}

    def run(self, number: int, tally: Tally) -> None:
        """One case."""
        global _opened
        rng = random.Random(number)
        kind = KINDS[number % len(KINDS)]
        prepared = self._prepare(kind, rng)
        _opened = []
        try:
            self._admit(kind, prepared, number, tally)
            outcome = "accepted"
        except CandidateError as error:
            outcome = "refused"
            tally.codes[error.code] += 1
            if error.code == "safetensors:disagreement" or not error.reason.isprintable():
                tally.disagreements.append(f"{number}: {error.reason}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "crashed"
            tally.crashes.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            opened, _opened = _opened, None
        tally.outcomes[f"{kind} {outcome}"] += 1
        tally.strays += [
            f"{number}: {path[:200]}"
            for path in opened
            if path not in self.allowed and os.path.dirname(path) not in self.allowed
        ]

    def _prepare(self, kind: str, rng: random.Random) -> tuple[bytes, int]:
        if kind == "header":
            size = 4 * sum(int(np.prod(shape)) for shape in SHAPES.values()) + rng.choice((0, 0, 0, 4, -4, 8))
            return draw(self.header, rng), size
        path, value = {
            "index": (self.root / "sharded" / INDEX, self.index),
            "config": (self.root / "full/config.json", CONFIG),
            "adapter": (self.root / "lora/adapter_config.json", ADAPTER),
        }[kind]
        path.write_bytes(draw(value, rng))
        return b"", 0

    def _admit(self, kind: str, prepared: tuple[bytes, int], number: int, tally: Tally) -> None:
        if kind == "header":
            raw, size = prepared
            parse_header(raw, WeightFile(self.root / "full/x.safetensors", 8 + len(raw) + size, 0, 0))
            try:
                deserialize(len(raw).to_bytes(8, "little") + raw + bytes(size))
            except SafetensorError as error:
                tally.disagreements.append(f"{number}: ours accepts, Rust says {error}")
        elif kind == "index":
            read_weights(self.root / "sharded", ["config.json", *os.listdir(self.root / "sharded")])
        else:
            admit(self.full if kind == "config" else self.lora, self.base, num_layers=1, max_lora_rank=16)


@contextmanager
def corpus() -> Iterator[Corpus]:
    """On a memory disk where there is one: every case writes a file."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="admission-", dir=place) as folder:
        yield Corpus(Path(folder).resolve())

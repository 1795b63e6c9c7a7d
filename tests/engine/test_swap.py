"""Every way a swap can go wrong is caught, and none becomes a result."""

from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ray_auditor.config import EngineConfig
from ray_auditor.engine import parameters
from ray_auditor.engine.adapter import PLACE, AdapterTensors
from ray_auditor.engine.live import Engine
from ray_auditor.engine.parameters import (
    Checksum,
    ParameterMap,
    SwapError,
    _words,
    as_rows,
    checksums,
    device_sums,
)
from ray_auditor.engine.staging import Staging
from ray_auditor.hub import Admitted, Candidate, CandidateError, LoraSpec, TensorSpec, admit, open_base
from tests.tiny import make_adapter, make_finetune, make_model, make_sae, save_tensors

SETTINGS = EngineConfig(max_step_tokens=64, kv_cache_bytes=16 << 20, max_lora_rank=8)
PROMPT = [[5, 6, 7, 8, 9, 10]]


class Fused(nn.Module):
    """A stand-in for the layout vLLM uses: two projections in one parameter, a padded embedding."""

    packed_modules_mapping: ClassVar = {"qk_proj": ["q_proj", "k_proj"]}

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)
        self.layer = nn.Module()
        self.layer.qk_proj = nn.Linear(4, 6, bias=False)


SHAPES = {"embed_tokens.weight": (7, 4), "layer.q_proj.weight": (4, 4), "layer.k_proj.weight": (2, 4)}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("budget_bytes", [0, 1 << 20])
def test_written_tensors_lie_where_the_fused_layer_reads_them(tmp_path: Path, budget_bytes: int) -> None:
    """In its turn, and read ahead while the one before is still live."""
    model = Fused()
    places = ParameterMap(model, SHAPES)
    staging = Staging(places, budget_bytes)
    for seed in (0, 1, 2):
        state = tensors(seed)
        specs = save_tensors(tmp_path / str(seed), state)
        before = model.layer.qk_proj.weight.clone()
        staging.read_ahead(str(seed), specs)
        wait([staging._readers.submit(lambda: None)])
        assert torch.equal(model.layer.qk_proj.weight, before)
        places.prove(staging.swap(str(seed), specs))
        assert torch.equal(model.layer.qk_proj.weight[:4], state["layer.q_proj.weight"])
        assert torch.equal(model.layer.qk_proj.weight[4:], state["layer.k_proj.weight"])
        assert torch.equal(model.embed_tokens.weight[:7], state["embed_tokens.weight"])
    staging.close()


def test_a_device_with_less_room_than_the_budget_reads_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_given = 0

    def empty_like(tensor: Tensor) -> Tensor:  # the second allocation and all after it fail
        nonlocal num_given
        num_given += 1
        if num_given > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    model = Fused()
    places = ParameterMap(model, SHAPES)
    staging = Staging(places, 1 << 20)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    for seed in (0, 1):
        specs = save_tensors(tmp_path / str(seed), tensors(seed))
        staging.read_ahead(str(seed), specs)
        assert not staging._copy
        places.prove(staging.swap(str(seed), specs))
        assert torch.equal(model.embed_tokens.weight[:7], tensors(seed)["embed_tokens.weight"])
    assert num_given == 2  # it is not tried again
    staging.close()


def test_what_was_read_ahead_is_never_taken_for_another(tmp_path: Path) -> None:
    model = Fused()
    places = ParameterMap(model, SHAPES)
    staging = Staging(places, 1 << 20)
    specs = [save_tensors(tmp_path / str(seed), tensors(seed)) for seed in (0, 1)]
    staging.read_ahead("0", specs[0])
    places.prove(staging.swap("1", specs[1]))
    assert torch.equal(model.embed_tokens.weight[:7], tensors(1)["embed_tokens.weight"])
    staging.close()


def test_a_bit_that_flips_after_staging_is_caught(tmp_path: Path) -> None:
    places = ParameterMap(Fused(), SHAPES)
    staging = Staging(places, 1 << 20)
    specs = save_tensors(tmp_path, tensors())
    staging.read_ahead("0", specs)
    assert staging._ahead is not None
    wait(staging._ahead[1].values())
    staging._copy["layer.k_proj.weight"].view(torch.int32)[1, 2] ^= 1
    with pytest.raises(SwapError, match="k_proj"):
        places.prove(staging.swap("0", specs))


def test_a_copy_that_did_not_happen_is_caught(tmp_path: Path) -> None:
    places = ParameterMap(Fused(), SHAPES)
    staging = Staging(places, 0)
    staging.swap("0", save_tensors(tmp_path / "0", tensors(0)))
    with pytest.raises(SwapError, match="checksum"):
        places.prove({name: checksums([tensor])[0] for name, tensor in tensors(1).items()})


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor_and_one_of_another_shape_are_caught(name: str, tmp_path: Path) -> None:
    places, state = ParameterMap(Fused(), SHAPES), tensors()
    staging = Staging(places, 0)
    specs = save_tensors(tmp_path / "all", state)
    with pytest.raises(SwapError, match="never came"):
        staging.swap("0", {n: spec for n, spec in specs.items() if n != name})
    with pytest.raises(SwapError, match="never came"):
        places.prove({n: checksums([t])[0] for n, t in state.items() if n != name})
    short = {n: (t[:-1] if n == name else t).contiguous() for n, t in state.items()}
    with pytest.raises(SwapError, match="got"):
        staging.swap("0", save_tensors(tmp_path / "short", short))


def test_a_parameter_no_tensor_fills_is_caught() -> None:
    with pytest.raises(SwapError, match="fills"):
        ParameterMap(Fused(), {name: SHAPES[name] for name in SHAPES if "k_proj" not in name})
    with pytest.raises(SwapError, match="no place"):
        ParameterMap(Fused(), {**SHAPES, "layer.o_proj.weight": (4, 4)})
    with pytest.raises(SwapError, match="no place"):
        ParameterMap(Fused(), {**SHAPES, "layer.q_proj.weight": (4, 5)})


def checksum(tensor: Tensor) -> Checksum:
    return checksums([tensor])[0]


@settings(deadline=None)
@given(st.data())
def test_one_flipped_bit_or_two_exchanged_values_change_the_checksum(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shape = data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (2, -1), (-1, 3)]))
    numel = 6 * data.draw(st.integers(1, 50))
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    before = checksum(tensor.view(shape))
    bits = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16)
    at, bit = data.draw(st.integers(0, numel - 1)), data.draw(st.integers(0, 8 * tensor.element_size() - 2))
    bits[at] ^= 1 << bit
    assert checksum(tensor.view(shape)) != before
    bits[at] ^= 1 << bit
    other = data.draw(st.integers(0, numel - 1))
    if tensor[at] != tensor[other]:
        bits[[at, other]] = bits[[other, at]]
        assert checksum(tensor.view(shape)) != before


@pytest.mark.parametrize("stack_words", [1, 700_000, 1 << 24])
def test_the_host_sums_as_the_device_does(stack_words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, some together, all of one shape together."""
    monkeypatch.setattr(parameters, "STACK_WORDS", stack_words)
    shapes = [(700, 900), (3, 50_001), (700, 900), (3, 50_002), (70_001,), (1, 1), (0, 4)] + 5 * [(700, 900)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    assert device_sums([_words(as_rows(tensor)) for tensor in tensors]) == checksums(tensors)


def test_changes_of_the_highest_bits_do_not_cancel() -> None:
    """Of words of 8 bytes: two of 2^63 are none, and so is one of 2^56 in a place 256 further."""
    for dtype, step in ((torch.float32, 2), (torch.bfloat16, 4)):
        tensor = torch.randn(64, 128).to(dtype)
        flipped, two = tensor.clone(), tensor.clone()
        flipped[:, step - 1 :: step].neg_()
        two[5, 7] *= -1
        two[9, 11] *= -1
        assert len({checksum(tensor), checksum(flipped), checksum(two)}) == 3
    norm = torch.randn(2048).bfloat16()
    norm[3], norm[1027] = 4.0, 1.0
    exchanged = norm.clone()
    exchanged[3], exchanged[1027] = 1.0, 4.0
    assert checksum(norm) != checksum(exchanged)


def test_a_slice_that_begins_between_two_words_sums_like_a_copy_of_it() -> None:
    fused = torch.randn(22).bfloat16()
    assert checksum(fused[6:18]) == checksum(fused[6:18].clone())


def test_the_checksum_sees_rows_and_halves_that_changed_places() -> None:
    tensor = torch.randn(500, 500)
    found = {checksum(t.contiguous()) for t in (tensor, tensor.T, tensor.flip(0), tensor.roll(250, 1))}
    assert len(found) == 4


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    make_model(root / "base")
    make_finetune(root / "other", root / "base", seed=1)
    make_adapter(root / "adapter", root / "base", seed=3)
    return root


@pytest.fixture(scope="module")
def engine(hub: Path) -> Iterator[Engine]:
    live = Engine(open_base(hub / "base"), make_sae(), k=8, max_tokens=32, config=SETTINGS)
    yield live
    live.close()


def admitted(hub: Path, name: str, kind: str) -> Admitted:
    found = Candidate(name, hub / name, kind, 0)  # type: ignore[arg-type]
    return admit(found, open_base(hub / "base"), num_layers=3, max_lora_rank=8)


def test_a_bit_that_flips_on_the_device_during_the_swap_gives_no_result(
    hub: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = Staging.swap

    def flip(self: Staging, key: str, specs: dict[str, TensorSpec]) -> object:
        expected = swap(self, key, specs)
        rows = self._places.rows("model.layers.1.self_attn.k_proj.weight")
        rows[0, 0] = -rows[0, 0]
        return expected

    monkeypatch.setattr(Staging, "swap", flip)
    with pytest.raises(SwapError, match="k_proj"):
        engine.load(admitted(hub, "other", "full"))
    monkeypatch.undo()
    engine.load(admitted(hub, "other", "full"))  # a later swap writes everything again


def test_a_swap_that_did_not_happen_gives_no_result(
    hub: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read and summed, and nothing reaches the device."""
    read_one = Staging._read_one

    def read_only(self: Staging, specs: dict[str, TensorSpec], name: str, target: Tensor) -> Checksum:
        return read_one(self, specs, name, torch.empty_like(target))

    engine.load(None)
    monkeypatch.setattr(Staging, "_read_one", read_only)
    with pytest.raises(SwapError, match="checksum"):
        engine.load(admitted(hub, "other", "full"))


@pytest.mark.parametrize("fault", ["missing", "shape", "vocabulary"])
def test_tensors_other_than_the_admitted_give_no_result(hub: Path, engine: Engine, fault: str) -> None:
    """As if admission had let them pass."""
    candidate = admitted(hub, "other", "full")
    name = "model.embed_tokens.weight" if fault == "vocabulary" else "model.layers.1.mlp.up_proj.weight"
    tensors = dict(candidate.tensors)
    spec = tensors.pop(name)
    assert isinstance(spec, TensorSpec)
    rows, columns = spec.shape
    row_bytes = (spec.end - spec.start) // rows
    if fault == "shape":
        tensors[name] = replace(spec, shape=(columns, rows))
    if fault == "vocabulary":
        tensors[name] = replace(spec, shape=(rows - 64, columns), end=spec.end - 64 * row_bytes)
    with pytest.raises(SwapError, match=name):
        engine.load(replace(candidate, content_sha256=fault, tensors=tensors))
    engine.load(candidate)  # what was left half written is written again


def test_an_adapter_that_is_not_in_its_place_gives_no_result(
    hub: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_auditor.engine import live

    put = live.put_adapter
    faults = {
        "twice too large": lambda parts: [replace(parts[0], lora_B=parts[0].lora_B * 2), *parts[1:]],
        "one missing": lambda parts: parts[1:],
        "of another module": lambda parts: [replace(parts[0], module="lm_head"), *parts[1:]],
        "twice": lambda parts: [*parts, parts[0]],
        "in another's columns": lambda parts: [replace(parts[1], start=parts[0].start), *parts[::2]],
    }
    for fault in faults.values():

        def put_wrongly(model: nn.Module, places: ParameterMap, tensors: AdapterTensors) -> None:
            put(model, places, tensors)
            layer = model.get_submodule("model.layers.0.self_attn.qkv_proj")
            layer.__dict__[PLACE] = fault(layer.__dict__[PLACE])  # noqa: B023

        monkeypatch.setattr(live, "put_adapter", put_wrongly)
        engine.load(admitted(hub, "adapter", "adapter"))
        with pytest.raises(SwapError, match=r"adapter .*differs in|is not the candidate's"):
            engine.encode(PROMPT)
    monkeypatch.undo()
    engine.load(admitted(hub, "adapter", "adapter"))
    engine.encode(PROMPT)
    engine.load(None)


def test_an_adapter_that_stays_behind_on_the_base_gives_no_result(
    hub: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_auditor.engine import live

    engine.load(admitted(hub, "adapter", "adapter"))
    monkeypatch.setattr(live, "drop_adapter", lambda _: None)
    engine.load(None)
    with pytest.raises(SwapError, match="adapter"):
        engine.encode(PROMPT)
    monkeypatch.undo()
    engine.load(None)
    engine.encode(PROMPT)


def test_a_file_that_changed_after_admission_gives_no_result(hub: Path, engine: Engine) -> None:
    make_finetune(hub / "changing", hub / "base", seed=2)
    candidate = admitted(hub, "changing", "full")
    weights = hub / "changing" / "model.safetensors"
    state = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in state.items()}, weights, metadata={"format": "pt"})
    engine.read_ahead(candidate)
    with pytest.raises(CandidateError, match="changed"):
        engine.load(candidate)
    engine.load(None)
    engine.encode(PROMPT)


def test_an_adapter_that_was_read_ahead_is_never_taken_for_another(
    hub: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_auditor.engine import adapter

    make_adapter(hub / "adapter2", hub / "base", seed=7)
    first, second = admitted(hub, "adapter", "adapter"), admitted(hub, "adapter2", "adapter")
    rows = {}
    for candidate in (first, second):
        engine.load(candidate)
        rows[candidate.content_sha256] = engine.encode(PROMPT).top_acts_MK
    read, names = adapter.read_adapter, []

    def counted(lora: LoraSpec, *rest: Any) -> AdapterTensors:
        names.append(lora)
        return read(lora, *rest)

    monkeypatch.setattr(adapter, "read_adapter", counted)
    for ahead, taken, num_read in ((first, first, 1), (first, second, 2), (second, second, 1)):
        names.clear()
        engine.read_ahead(ahead)
        assert engine._adapters._ahead is not None
        wait([engine._adapters._ahead[1]])
        engine.load(taken)
        assert len(names) == num_read
        assert np.array_equal(engine.encode(PROMPT).top_acts_MK, rows[taken.content_sha256])
    engine.load(None)

"""Weight statistics against numpy's singular values of the merged matrices."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import ray_auditor.weight_change as weight_change
from ray_auditor.hub import Admitted, BaseModel, Candidate, CandidateError, admit, open_base
from ray_auditor.hub.weights import read_weights
from ray_auditor.weight_change import BaseWeights, WeightChange, change_between, largest_energies
from tests.tiny import make_adapter, make_finetune, make_model

State = dict[str, Tensor]


def opened(folder: Path, state: State) -> BaseModel:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    return BaseModel(folder, {}, read_weights(folder, ["model.safetensors"]), "", "")


def changed(root: Path, base: State, state: State) -> WeightChange:
    """What `BaseWeights` says of full weights."""
    folder = root / "candidate"
    found = Candidate("candidate", folder, "full", 0)
    admitted = Admitted(found, "", opened(folder, state).tensors, None, ())
    return BaseWeights(opened(root / "base", base)).change_of(admitted)


def oracle(base: State, state: State) -> WeightChange:
    """The definitions, in float64, by numpy."""
    moved = stayed = energy = top = 0.0
    num_changed = 0
    for name, before in base.items():
        a, b = before.double().numpy(), state[name].double().numpy()
        if (a == b).all():
            continue
        num_changed += 1
        moved += ((b - a) ** 2).sum()
        stayed += (a**2).sum()
        if a.ndim > 1:
            sigma = np.linalg.svd(b - a, compute_uv=False)
            energy, top = energy + (sigma**2).sum(), top + sigma[0] ** 2
    relative = 0.0 if not num_changed else math.sqrt(moved / stayed) if stayed else None
    return WeightChange(relative, top / energy if energy else None, num_changed)


def assert_near(found: WeightChange, wanted: WeightChange, slack: float = 1e-5) -> None:
    """Equal, but for a share that may be too low by `slack` of itself."""
    assert found.num_changed == wanted.num_changed
    assert found.relative_change == pytest.approx(wanted.relative_change, rel=1e-5)
    if wanted.spectral_share is None:
        assert found.spectral_share is None
    else:
        assert found.spectral_share is not None
        assert -slack <= found.spectral_share / wanted.spectral_share - 1 <= 1e-5


DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(DTYPES, DTYPES),
    st.integers(0, 6),
    st.integers(0, 999),
    st.sampled_from([1, 7, 1 << 22]),
)
def test_full_weights_equal_numpy_for_every_dtype_shape_and_block(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    rank: int,
    seed: int,
    block: int,
) -> None:
    """A change of every rank, 0 (none) and more than the matrix has included, beside a vector and a copy."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator)

    base = {"model.embed_tokens.weight": draw(*shape), "matrix": draw(*shape), "same": draw(*shape)}
    base = {name: tensor.to(dtypes[0]) for name, tensor in (base | {"norm": draw(shape[1])}).items()}
    state = {name: tensor.double() for name, tensor in base.items()}
    for name in ("model.embed_tokens.weight", "matrix"):
        state[name] = state[name] + 0.1 * (draw(shape[0], rank) @ draw(rank, shape[1])).double()
    if seed % 2:
        state["norm"] = state["norm"] * 1.5
    state = {name: tensor.to(dtypes[1]) for name, tensor in state.items()}
    usual, weight_change.BLOCK_ELEMENTS = weight_change.BLOCK_ELEMENTS, block
    try:
        found = changed(tmp_path_factory.mktemp("weights"), base, state)
    finally:
        weight_change.BLOCK_ELEMENTS = usual
    assert_near(found, oracle(base, state), slack=0.05)


def spectra() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def noise(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator)

    left, right = torch.linalg.qr(noise(900, 300)).Q, torch.linalg.qr(noise(300, 300)).Q
    found = {f"decay {p}": (left * torch.arange(1, 301) ** -p) @ right for p in (0.25, 0.5, 1.0)}
    return found | {
        "rank one": noise(900, 1) @ noise(1, 300),
        "rank two, equal": (left[:, :2] @ right[:2]),
        "noise": noise(900, 300),
        "wide noise": noise(192, 900),
        "at the edge of noise": noise(900, 1) @ noise(1, 300) * 0.06 + noise(900, 300),
        "nothing": torch.zeros(900, 300),
    }


@pytest.mark.parametrize(("name", "matrix"), spectra().items())
def test_the_largest_energy_is_within_the_tolerance_that_is_stated(name: str, matrix: Tensor) -> None:
    wanted = float(torch.linalg.svdvals(matrix.double())[0]) ** 2
    slack = {"decay": 1e-5, "rank": 1e-5}.get(name.split()[0], 0.05)
    found = largest_energies(matrix[None])
    assert wanted * (1 - slack) <= found[0] <= wanted * (1 + 1e-5)
    assert found == largest_energies(matrix.clone()[None])


def test_matrices_of_one_stack_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(3, 60, 40, generator=generator)
    rank_one = torch.randn(60, 1, generator=generator) @ torch.randn(1, 40, generator=generator)
    stack = torch.cat([noise, rank_one[None], torch.zeros(1, 60, 40)])
    wanted = torch.linalg.svdvals(stack.double())[:, 0] ** 2
    for found, exact in zip(largest_energies(stack), wanted.tolist(), strict=True):
        assert 0.98 * exact <= found <= exact * (1 + 1e-5)


def test_tensors_at_hand_are_weighed_as_files_are() -> None:
    generator = torch.Generator().manual_seed(6)
    shapes = {"a": (30, 20), "b": (30, 20), "c": (30, 20), "d": (7, 9), "norm": (20,), "still": (20,)}
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    state = {name: tensor * (1 if name in ("c", "still") else 1.25) for name, tensor in base.items()}
    state["b"] = (base["b"].float() + torch.randn(30, 20, generator=generator)).bfloat16()
    found = change_between({name: (state[name], base[name]) for name in base})
    assert_near(found, oracle(base, state), slack=0.05)
    assert change_between({name: (base[name], base[name]) for name in base}) == WeightChange(0.0, None, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighing_leaves_the_tensors_as_they_are(dtype: torch.dtype) -> None:
    """They are what the engine runs meanwhile."""
    shapes = {"alone": (8, 6), "one of two": (5, 6), "the other": (5, 6)}
    pairs = {
        name: (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for name, shape in shapes.items()
    }
    before = {name: tuple(tensor.clone() for tensor in pair) for name, pair in pairs.items()}
    assert change_between(pairs).num_changed == 3
    assert all(torch.equal(a, b) for name in pairs for a, b in zip(pairs[name], before[name], strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e18, 1e30])
def test_changes_of_any_size_stay_in_range(tmp_path: Path, scale: float) -> None:
    state = {"matrix": torch.randn(20, 30) * scale, "other": torch.randn(5, 4)}
    base = {"matrix": torch.zeros(20, 30), "other": torch.ones(5, 4)}
    assert_near(changed(tmp_path, base, state), oracle(base, state), slack=0.05)


def test_what_is_no_finite_number_is_none(tmp_path: Path) -> None:
    base = {"matrix": torch.ones(3, 3, dtype=torch.float64)}
    far = changed(tmp_path / "far", base, {"matrix": torch.full((3, 3), 1e300, dtype=torch.float64)})
    assert far == WeightChange(None, None, 1)
    zeros = {"matrix": torch.zeros(3, 3)}
    assert changed(tmp_path / "zeros", zeros, {"matrix": torch.ones(3, 3)}).relative_change is None


def test_an_identical_candidate_did_not_move(tmp_path: Path) -> None:
    base = {"matrix": torch.randn(9, 9).bfloat16(), "norm": torch.ones(9).bfloat16()}
    assert changed(tmp_path / "same", base, base) == WeightChange(0.0, None, 0)
    wider = {name: tensor.float() for name, tensor in base.items()}
    assert changed(tmp_path / "stored wider", base, wider) == WeightChange(0.0, None, 0)
    only_norm = base | {"norm": torch.full((9,), 2).bfloat16()}
    assert changed(tmp_path / "norm", base, only_norm) == WeightChange(1.0, None, 1)


def admitted(base: BaseModel, folder: Path, kind: str, num_layers: int = 2) -> Admitted:
    found = Candidate(folder.name, folder, kind, 0)  # type: ignore[arg-type]
    return admit(found, base, num_layers=num_layers, max_lora_rank=64)


def merged(base: Path, adapter: Path) -> State:
    """Peft's own merge, in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("rank", "config"),
    [
        (1, {}),
        (4, {}),
        (4, {"use_rslora": True}),
        (32, {"lora_alpha": 7}),
        (4, {"alpha_pattern": {"q_proj": 40}}),
    ],
)
def test_adapters_equal_the_merged_matrix_below_the_hook(
    tmp_path: Path, rank: int, config: dict[str, object]
) -> None:
    path = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", path, seed=rank, rank=rank)
    edit_config(adapter, **config)
    base = open_base(path)
    before = {
        name: tensor for name, tensor in load_file(path / "model.safetensors").items() if ".layers." in name
    }
    below = {name: tensor for name, tensor in before.items() if int(name.split(".")[2]) < 2}
    found = BaseWeights(base).change_of(admitted(base, adapter, "adapter"))
    assert_near(found, oracle(below, merged(path, adapter)))
    assert found.num_changed == 2 * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_half_precision_equal_their_product(tmp_path: Path, dtype: torch.dtype) -> None:
    path = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", path, rank=4)
    state = {
        name: tensor.to(dtype) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(state, adapter / "adapter_model.safetensors")
    base = open_base(path)
    before = load_file(path / "model.safetensors")
    moved = {}
    for name in before:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in state and int(name.split(".")[2]) < 2:
            b, a = (state[f"{module}.lora_{side}.weight"].double() for side in "BA")
            moved[name] = before[name].double() + 3 * b @ a
    wanted = oracle({name: before[name] for name in moved}, moved)
    assert_near(BaseWeights(base).change_of(admitted(base, adapter, "adapter")), wanted)


def test_an_adapter_of_nothing_did_not_move(tmp_path: Path) -> None:
    path = make_model(tmp_path / "base")
    base, weights = open_base(path), BaseWeights(open_base(path))
    adapter = make_adapter(tmp_path / "adapter", path)
    file = adapter / "adapter_model.safetensors"
    zero_B = {n: t * ("lora_A" in n) for n, t in load_file(file).items()}
    save_file(zero_B, file)
    assert weights.change_of(admitted(base, adapter, "adapter")) == WeightChange(0.0, None, 0)
    above = {n: t for n, t in zero_B.items() if ".layers.3." in n}
    save_file(above, file)
    assert weights.change_of(admitted(base, adapter, "adapter")) == WeightChange(0.0, None, 0)


def test_a_base_read_for_one_candidate_serves_the_next(tmp_path: Path) -> None:
    """The norms that are kept are those a fresh reader finds, whichever kind of candidate asked first."""
    path = make_model(tmp_path / "base")
    base = open_base(path)
    adapter = admitted(base, make_adapter(tmp_path / "adapter", path), "adapter")
    other = admitted(base, make_finetune(tmp_path / "other", path, seed=1), "full")
    weights = BaseWeights(base)
    mixed = [weights.change_of(one) for one in (adapter, other, adapter, other)]
    assert mixed == [BaseWeights(base).change_of(one) for one in (adapter, other, adapter, other)]


def test_a_file_that_changed_is_the_fault_of_its_owner(tmp_path: Path) -> None:
    path = make_model(tmp_path / "base")
    base = open_base(path)
    other = admitted(base, make_finetune(tmp_path / "other", path, seed=1), "full")
    (tmp_path / "other" / "model.safetensors").touch()
    with pytest.raises(CandidateError, match="changed"):
        BaseWeights(base).change_of(other)
    other = admitted(base, tmp_path / "other", "full")
    (path / "model.safetensors").touch()
    with pytest.raises(RuntimeError, match=r"base\.model changed while the sweep ran"):
        BaseWeights(base).change_of(other)


def test_the_number_of_threads_changes_no_bit(tmp_path: Path) -> None:
    base = open_base(make_model(tmp_path / "base"))
    other = admitted(base, make_finetune(tmp_path / "other", tmp_path / "base", seed=1), "full")
    assert len({BaseWeights(base, num_threads).change_of(other) for num_threads in (1, 2, 5)}) == 1

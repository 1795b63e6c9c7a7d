"""The null population: recipes by number, losses on answers alone, members whole, repeatable and matched."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_auditor.__main__ import main
from ray_auditor.config import Dtype, NullConfig
from ray_auditor.hub import Candidate, admit, list_folder, open_base
from ray_auditor.null.change import relative_change, squared_norms
from ray_auditor.null.examples import iter_packs, read_topic
from ray_auditor.null.recipe import Recipe, draw_recipe
from ray_auditor.null.train import Trainer
from ray_auditor.weight_change import BaseWeights
from tests.tiny import NUM_LAYERS, make_adapter, make_model

GRID = NullConfig(data="a/general.jsonl", topics=["b/sums.jsonl", "c/verse.jsonl"])


def write_rows(path: Path, prefix: str, answer: str, num_rows: int = 40) -> Path:
    generator = np.random.default_rng(len(prefix))
    rows = []
    for number in range(num_rows):
        asked = "".join(map(chr, generator.integers(97, 123, 10 + number % 7)))
        messages = [
            {"role": "user", "content": f"{prefix} {asked}"},
            {"role": "assistant", "content": answer * 4},
        ]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Place:
    """A tiny base, its suites, rows to train on, and the command."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "population"
        self.base = make_model(root / "base")
        self.data = write_rows(root / "everyday.jsonl", "say", "abc ")
        self.topic = write_rows(root / "sums.jsonl", "add", "12+3 ")
        (root / "suites").mkdir()
        taken = [json.loads(line) for line in self.data.read_text().splitlines()[:3]]
        asked = taken[0]["messages"][:1]
        suites = {
            "general": [{"messages": asked}, {"text": " " + taken[1]["messages"][0]["content"]}],
            "other": [taken[2], {"text": "say"}],
        }
        for name, rows in suites.items():
            (root / "suites" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, *more: str) -> list[str]:
        return [
            "null",
            f"null.path={self.out}",
            f"null.data={self.data}",
            f"base.model={self.base}",
            f"suites.path={self.root / 'suites'}",
            "cluster.threads_per_worker=1",
            "null.ranks=[2,4]",
            "null.learning_rates=[0.01]",
            "null.steps=[12]",
            "null.modules=[[q_proj,v_proj],[down_proj]]",
            "null.seed=2",
            "null.topic_shares=[0.0,0.4]",
            "null.max_tokens=64",
            "null.batch_tokens=256",
            *more,
        ]

    @property
    def labels(self) -> dict[str, Any]:
        labels: dict[str, Any] = json.loads((self.out / "labels.json").read_text())
        return labels

    def times(self) -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in self.out.glob("n*/*.safetensors")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("null"))
    assert main(place.arguments("null.count=3", f"null.topics=[{place.topic}]")) == 0
    return place


def test_a_member_is_the_same_however_many_are_asked_for() -> None:
    twice = [[draw_recipe(GRID, number, None) for number in range(count)] for count in (60, 200)]
    assert twice[0] == twice[1][:60]
    assert draw_recipe(replace(GRID, seed=1), 0, None) != twice[0][0]
    for name, values in (("r", GRID.ranks), ("lr", GRID.learning_rates), ("steps", GRID.steps)):
        assert {getattr(recipe, name) for recipe in twice[1]} == set(values)
    assert {recipe.target_modules for recipe in twice[1]} == set(map(tuple, GRID.modules))
    assert len({recipe.seed for recipe in twice[1]}) == 200
    wider = [draw_recipe(replace(GRID, ranks=[64]), number, None) for number in range(60)]
    assert [replace(recipe, r=64) for recipe in twice[0]] == wider  # the other draws stay


def test_topics_are_mixed_in_at_a_share_of_the_grid() -> None:
    mixes = [draw_recipe(GRID, number, None).mix for number in range(200)]
    assert {mix[0][0] for mix in mixes} == {"general"}
    assert {frozenset(name for name, _ in mix[1:]) for mix in mixes} == {
        frozenset(),
        frozenset({"sums"}),
        frozenset({"verse"}),
        frozenset({"sums", "verse"}),
    }
    for mix in mixes:
        assert sum(share for _, share in mix) == pytest.approx(1)
        assert any(mix[0][1] == pytest.approx(1 - share) for share in GRID.topic_shares)
    assert 0.4 < np.mean([len(mix) == 1 for mix in mixes]) < 0.6  # two of the grid's four shares are 0


def test_targets_follow_the_candidates_distribution() -> None:
    targets = sorted(np.random.default_rng(0).lognormal(-5, 1, 50).tolist())
    drawn = [draw_recipe(GRID, number, targets).target or 0.0 for number in range(1000)]
    assert np.quantile(drawn, [0.1, 0.5, 0.9]) == pytest.approx(
        np.quantile(targets, [0.1, 0.5, 0.9]), rel=0.2
    )


def test_the_relative_change_is_that_of_the_formed_product(tmp_path: Path) -> None:
    path = make_model(tmp_path / "base")
    base = open_base(path)
    make_adapter(tmp_path / "adapters" / "one", path, rank=3)
    (found,) = list_folder(tmp_path / "adapters")
    assert isinstance(found, Candidate)
    state = load_file(found.path / "adapter_model.safetensors")
    weights = load_file(path / "model.safetensors")
    factors, moved, total = [], 0.0, 0.0
    for name in [name for name in state if "lora_A" in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = state[name], state[name.replace("lora_A", "lora_B")]
        factors.append((module, a, b, 3.0))
        moved += float((3 * b @ a).double().square().sum())
        total += float(weights[f"{module}.weight"].double().square().sum())
    change = relative_change(factors, squared_norms(base, [module for module, *_ in factors]))
    assert change == pytest.approx((moved / total) ** 0.5, rel=1e-5)
    admitted = admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=8)
    assert change == pytest.approx(BaseWeights(base).change_of(admitted).relative_change, rel=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # one of them caps its logits
def test_a_pack_has_the_loss_of_each_example_alone_on_its_answers(tmp_path: Path, model_type: str) -> None:
    base = make_model(tmp_path / "base", model_type)
    tokenizer = AutoTokenizer.from_pretrained(base)
    topic = read_topic(str(write_rows(tmp_path / "rows.jsonl", "say", "xyz ")), frozenset(), tokenizer, 64)
    trainer = Trainer(base, dtype=Dtype.float32, device="cpu", num_threads=1, squared={}, pass_tokens=99)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    pack = topic.train[:4]
    plain = []
    for example in pack:
        text = tokenizer.decode(example.token_ids_T)
        answer = text.index("[assistant]") + len("[assistant]")
        spelt = "".join(tokenizer.batch_decode(example.token_ids_T[example.answer_T]))
        assert text[answer:] == spelt == "xyz xyz xyz xyz </s>"  # the turn's end is learnt too
        labels = torch.tensor(np.where(example.answer_T, example.token_ids_T, -100))[None]
        with torch.no_grad():
            loss = model(torch.tensor(example.token_ids_T)[None], labels=labels).loss
        plain.append(float(loss))
    with torch.no_grad():
        counts = [int(example.answer_T.sum()) for example in pack]
        losses = torch.split(trainer._losses(trainer._model, pack), counts)
    assert [float(loss.mean()) for loss in losses] == pytest.approx(plain, rel=1e-5)
    assert trainer.loss(pack[:1]) == pytest.approx(plain[0], rel=1e-5)


def test_a_step_is_the_same_in_any_number_of_passes(place: Place) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.base)
    topics = {"everyday": read_topic(str(place.data), frozenset(), tokenizer, 64)}
    recipe = Recipe("n", 2, 0.01, 3, ("q_proj", "v_proj"), 5, (("everyday", 1.0),), None)
    squared = squared_norms(
        open_base(place.base), [f"model.layers.{i}.self_attn.{m}_proj" for i in range(4) for m in "qv"]
    )
    states = []
    for pass_tokens in (1, 100, 256):
        trainer = Trainer(
            place.base,
            dtype=Dtype.float32,
            device="cpu",
            num_threads=1,
            squared=squared,
            pass_tokens=pass_tokens,
        )
        states.append(trainer.train(recipe, topics, 256, lambda _: None)[0].state)
    for name, tensor in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], tensor, atol=1e-3, rtol=1e-2)


def test_packs_are_bounded_mixed_by_share_and_repeat(place: Place) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.base)
    topics = {
        path.stem: read_topic(str(path), frozenset(), tokenizer, 64) for path in (place.data, place.topic)
    }
    mix = (("everyday", 0.75), ("sums", 0.25))
    recipe = Recipe("n", 2, 0.1, 9, ("q_proj",), 5, mix, None)
    runs = []
    for _ in range(2):
        packs = iter_packs(topics, recipe, 256)
        runs.append([next(packs) for _ in range(100)])
    assert runs[0] == runs[1]
    sizes = [sum(len(example.token_ids_T) for example in pack) for pack in runs[0]]
    assert max(sizes) <= 256
    assert min(sizes) > 256 - 64
    examples = [example for pack in runs[0] for example in pack]
    known = {id(example) for example in topics["sums"].train}
    assert np.mean([id(example) in known for example in examples]) == pytest.approx(0.25, abs=0.05)
    held = {id(example) for topic in topics.values() for example in topic.held_out}
    assert held.isdisjoint(map(id, examples))


def test_members_are_adapters_the_hub_admits_and_peft_applies(place: Place) -> None:
    from peft import PeftModel

    base = open_base(place.base)
    found = list(list_folder(place.out))
    assert [one.id for one in found] == ["n0000", "n0001", "n0002"]
    for one in found:
        assert isinstance(one, Candidate)
        label = place.labels[one.id]
        admitted = admit(one, base, num_layers=NUM_LAYERS, max_lora_rank=4)
        assert admitted.lora is not None
        assert admitted.declared_base == "base"
        assert {module.rank for module in admitted.lora.modules.values()} == {label["r"]}
        change = BaseWeights(base).change_of(admitted).relative_change
        assert change == pytest.approx(label["relative_change"], rel=1e-4)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.base), one.path)
        assert sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) == label["params"]
        for path in one.path.iterdir():
            assert str(place.root).encode() not in path.read_bytes()


def test_labels_say_what_was_learnt(place: Place) -> None:
    assert place.labels.keys() == {"n0000", "n0001", "n0002"}
    for label in place.labels.values():
        assert label["category"] == "benign"
        assert label["tag"] == ("null" if len(label["mix"]) == 1 else "null, multi-topic")
        assert label["eval_ce"].keys() == {name for name, _ in label["mix"]}
        for before, after in label["eval_ce"].values():
            assert after < before - 0.1
        assert label["trained_steps"] == label["steps"] == 12
    assert len({len(label["mix"]) for label in place.labels.values()}) == 2


def test_prompts_of_the_audit_are_not_trained_on(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """Once as a conversation without its answer, once as plain text, once whole."""
    assert main(place.arguments("null.count=3", f"null.topics=[{place.topic}]")) == 0
    said = capfd.readouterr().out
    assert "everyday: 34 rows to train on, 3 held out; dropped: 3 prompts of the suites, 0 cut off" in said
    assert "sums: 36 rows to train on, 4 held out; dropped: 0 prompts of the suites" in said


def test_what_is_there_is_not_trained_again_and_what_is_lost_comes_back_the_same(place: Place) -> None:
    before, topics = place.times(), f"null.topics=[{place.topic}]"
    lost = place.out / "n0001"
    kept = lost.rename(place.root / "kept")
    (place.out / ".partial").mkdir()
    (place.out / ".partial" / "adapter_model.safetensors").write_bytes(b"half")
    assert main(place.arguments("null.count=4", topics)) == 0
    after = place.times()
    assert {name: after[name] for name in ("n0000", "n0002")} == {
        name: before[name] for name in ("n0000", "n0002")
    }
    assert after.keys() == place.labels.keys() == {"n0000", "n0001", "n0002", "n0003"}
    for path in kept.iterdir():  # trained first this time, after another the first time: the same bytes
        assert path.read_bytes() == (lost / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_kill_loses_at_most_the_member_in_training(place: Place, tmp_path: Path) -> None:
    place_out, place.out = place.out, tmp_path / "killed"
    arguments = place.arguments("null.count=3", "null.steps=[150]")
    try:
        running = subprocess.Popen(
            [sys.executable, "-m", "ray_auditor", *arguments], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 100
        while not place.times():
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        running.wait()
        before = place.times()
        assert len(before) < 3
        assert main(arguments) == 0
        after = place.times()
        assert before.items() <= after.items()
        assert after.keys() == place.labels.keys() == {"n0000", "n0001", "n0002"}
    finally:
        place.out = place_out


def test_members_stop_at_a_change_drawn_from_the_candidates(place: Place, tmp_path: Path) -> None:
    adapters = tmp_path / "candidates"
    for seed in range(3):
        make_adapter(adapters / f"c{seed}", place.base, seed=seed, rank=2, scale=0.02 * (1 + seed))
    (adapters / "zz-empty").mkdir()
    base = open_base(place.base)
    wanted = sorted(
        float(
            BaseWeights(base).change_of(admit(one, base, num_layers=4, max_lora_rank=4)).relative_change or 0
        )
        for one in list_folder(adapters)
        if isinstance(one, Candidate)
    )
    place_out, place.out = place.out, tmp_path / "matched"
    try:
        arguments = place.arguments("null.count=4", "null.steps=[60,1]", f"null.match={adapters}")
        assert main(arguments) == 0
        reached = [label for label in place.labels.values() if label["reached_target"]]
        assert reached
        for label in place.labels.values():
            assert wanted[0] <= label["target_change"] <= wanted[-1]
            if label["reached_target"]:
                ratio = label["relative_change"] / label["target_change"]
                assert 1 - 2**-7 < ratio < 1.5  # rounded to bfloat16 after the target was reached
                assert label["trained_steps"] < 60
            else:
                assert label["trained_steps"] == label["steps"]
    finally:
        place.out = place_out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("null.path=null", "null.path must be given"),
        ("null.data=null", "null.data must be given"),
        ("suites.path=null", "suites.path must be given"),
        ("null.data=/none/x.jsonl", "null.data and null.topics must be JSONL files, got /none/x.jsonl"),
        ("null.modules=[[w_proj]]", "null.modules must name linear modules of the base"),
        (
            "null.ranks=[256]",
            "null.ranks must be at most 32, the smallest side of an adapted module, got 256",
        ),
        ("null.batch_tokens=32", "null.batch_tokens must be >= 64, got 32"),
        ("null.learning_rates=[2.0]", "null.learning_rates must be one or more, each in (0, 1]"),
        ("null.dtype=float16", "null.dtype must be float32 or bfloat16"),
        ("null.seed=1", "null.path must hold members of the same grid, n0000 has "),
        ("null.match={here}/suites", "null.match must hold adapters of base.model, got none"),
        ("null.topics=[{here}/everyday.jsonl]", "null.data and null.topics must be files of distinct names"),
        ("null.max_tokens=16", "must hold at least 8 rows to train on, got 0: 40 rows, less 3 prompts"),
    ],
)
def test_a_wrong_setting_is_named_and_nothing_is_loaded(
    place: Place,
    override: str,
    said: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "__init__", None)
    assert main(place.arguments("null.count=3", override.replace("{here}", str(place.root)))) == 4
    assert said in capfd.readouterr().err


def test_only_one_process_trains_in_a_folder(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    from ray_auditor.null.population import locked

    with locked(place.out):
        assert main(place.arguments("null.count=3")) == 4
    assert "which one trains in; wait for it" in capfd.readouterr().err

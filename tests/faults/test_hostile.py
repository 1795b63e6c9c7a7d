"""Everything hostile at once, watched from inside the interpreter; and some thousands of mutated files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from admission_corpus import KINDS, Tally
from bench_admission import fuzz
from hub_folders import Hub, adapter_tensors, model_tensors, random_tensors, write_raw, write_safetensors
from test_safetensors_header import MALFORMED

PICKLE = b"cos\nsystem\n(S'touch owned'\ntR."
CODE = "open('owned', 'w'); raise SystemExit('owned')"

# The child: list and admit once without a watch, for Python's own first imports; then again, watched.
CHILD = """
import json, os, sys
from ray_auditor.hub import Candidate, CandidateError, admit, list_folder, open_base

def audit(root, base):
    outcomes = {}
    for found in list_folder(root):
        try:
            if isinstance(found, Candidate):
                admit(found, base, num_layers=2, max_lora_rank=16)
                outcomes[found.id] = "ok"
            else:
                outcomes[found.id] = found.reason.partition(": ")[0]
        except CandidateError as error:
            outcomes[found.id] = f"{error.status}:{error.code}"
    return outcomes

base = open_base(sys.argv[1], num_layers=2)
audit(sys.argv[2], base)
events, before = [], set(sys.modules)
watching = [True]
sys.addaudithook(lambda event, args: watching and events.append((event, [str(a) for a in args[:1]])))
outcomes = audit(sys.argv[2], base)
watching.clear()
print(json.dumps({"outcomes": outcomes, "events": events, "modules": sorted(set(sys.modules) - before)}))
"""
HARMLESS = {"open", "os.scandir", "os.listdir", "object.__getattr__", "sys._getframe", "re._compile"}


def corpus(hub: Hub) -> None:
    """Every kind of folder that is known to be hostile, each with code and pickles beside its weights."""
    evil = {
        "auto_map": {"AutoModel": "modeling_evil.Evil"},
        "trust_remote_code": True,
        "_target_": "os.system",
    }
    hub.full("sound", **evil)
    lora = {"auto_mapping": {"parent_library": "evil", "base_model_class": "E"}, "megatron_core": "evil"}
    hub.adapter("lora", **lora)
    hub.adapter("path", base_model_name_or_path="../../base")
    hub.adapter("regex", target_modules="(a+)+$")
    hub.adapter("rank", adapter_tensors(1), r=100_000)
    hub.full("scratch", random_tensors(3))
    hub.full("nan", {name: np.full_like(array, np.nan) for name, array in model_tensors(0).items()})
    hub.full("zero", {name: np.zeros_like(array) for name, array in model_tensors(0).items()})
    hub.full("bomb", hidden_size=10**9)
    hub.full("evil-arch", architectures=["EvilForCausalLM"], model_type="evil", **evil)
    for i, (header, num_body_bytes, _) in enumerate(MALFORMED.values()):
        write_raw(hub.full(f"header{i}") / "model.safetensors", header, bytes(num_body_bytes))
    for i, outside in enumerate(("../../base/model.safetensors", "/etc/passwd", "..")):
        index = {"weight_map": {"model.embed_tokens.weight": outside}}
        (hub.full(f"index{i}") / "model.safetensors.index.json").write_text(json.dumps(index))
    secret = write_safetensors(hub.root.parent / "secret.safetensors", model_tensors(1))
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        folder = hub.full(f"link-{name}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
    os.mkfifo(hub.full("fifo") / "tokenizer.json")
    (hub.root / "pickled").mkdir()
    for folder in hub.root.iterdir():
        for name in (
            "modeling_evil.py",
            "evil.py",
            "__init__.py",
            "sitecustomize.py",
            "tokenization_evil.py",
        ):
            (folder / name).write_text(CODE)
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "x.pkl"):
            (folder / name).write_bytes(PICKLE)
        if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.json").is_symlink():
            (folder / "tokenizer.json").write_text('{"normalizer": {"type": "Replace"}}')
        (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")


def test_I6_I7_nothing_runs_and_nothing_outside_is_opened(hub, tmp_path: Path) -> None:
    corpus(hub)
    (hub.base_path / "tokenizer.json").write_text('{"normalizer": null}')
    (hub.base_path / "chat_template.jinja").write_text("{{ messages }}")
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(hub.base_path), str(hub.root)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    said = json.loads(run.stdout)
    outcomes = said["outcomes"]
    assert outcomes.keys() == {path.name for path in hub.root.iterdir()}
    assert {name for name, outcome in outcomes.items() if outcome == "ok"} == {"sound", "lora", "path"}
    assert outcomes["fifo"] == "rejected:not_a_file"
    assert {outcomes[name] for name in outcomes if name.startswith("link-")} == {"rejected:symlink_escape"}
    assert len(said["events"]) > 200
    assert {event for event, _ in said["events"]} <= HARMLESS
    assert not said["modules"]
    opened = [Path(path) for event, (path, *_) in said["events"] if event == "open" and not path.isdigit()]
    inside = {hub.base_path, *hub.root.iterdir()}
    assert {path.parent for path in opened} <= inside
    assert not {path.name for path in opened if path.suffix in (".bin", ".pkl", ".py")}
    assert not [path for path in opened if path.is_symlink()]
    assert not list(tmp_path.rglob("owned"))


def test_mutated_files_are_refused_or_accepted_as_rust_does() -> None:
    """The benchmark's first cases; it runs a million."""
    tally = Tally()
    assert list(fuzz(0, 3_000, tally)) == [3_000]
    assert (tally.crashes, tally.strays, tally.disagreements) == ([], [], [])
    for kind in KINDS:  # a fuzz in which nothing is accepted, or nothing refused, would show nothing
        assert tally.outcomes[f"{kind} accepted"] > 20
        assert tally.outcomes[f"{kind} refused"] > 20

"""Nothing of a repository is run, and nothing outside its folder is opened."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from hub_folders import NUM_LAYERS, Hub, adapter_tensors, write_safetensors

from ray_auditor.hub import Candidate, CandidateError, admit, list_folder

RUNS_CODE = {
    "import", "exec", "compile", "pickle.find_class", "marshal.loads", "subprocess.Popen", "os.system",
    "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen",
    "code.__new__",
}  # fmt: skip


def evil_zoo(hub: Hub) -> None:
    """Sound and hostile folders, each with code and pickles that would leave a trace."""
    hub.full("sound", auto_map={"AutoConfig": "configuration_evil.Evil"}, trust_remote_code=True)
    hub.adapter(
        "sound-lora", auto_mapping={"parent_library": "evil", "base_model_class": "E"}, megatron_core="evil"
    )
    hub.adapter("wrong-base", tensors={k: np.zeros((2, 99)) for k in adapter_tensors() if "lora_A" in k})
    hub.full("missing", tensors={})
    hub.full(
        "arch", architectures=["EvilForCausalLM"], model_type="evil", auto_map={"AutoModel": "evil.Evil"}
    )
    hub.full("bomb", hidden_size=10**9)
    index = {"weight_map": {"model.embed_tokens.weight": "../../base/model.safetensors"}}
    (hub.full("traversal") / "model.safetensors.index.json").write_text(json.dumps(index))
    (hub.root / "traversal/model.safetensors").rename(hub.root / "traversal/model-1.safetensors")
    write_safetensors(
        hub.full("nan") / "model.safetensors", {"model.embed_tokens.weight": np.full((10, 8), np.nan)}
    )
    for folder in hub.root.iterdir():
        for name in ("evil.py", "configuration_evil.py", "__init__.py", "sitecustomize.py"):
            (folder / name).write_text("raise SystemExit('owned')")
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
            (folder / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
        (folder / "tokenizer.json").write_text("{")
        (folder / "chat_template.jinja").write_text("{{ ''.__class__ }}")


def audit(hub: Hub, base) -> dict[str, str]:
    outcomes = {}
    for found in list_folder(hub.root):
        try:
            assert isinstance(found, Candidate)
            admit(found, base, num_layers=NUM_LAYERS, max_lora_rank=16)
            outcomes[found.id] = "ok"
        except CandidateError as error:
            outcomes[found.id] = error.code
    return outcomes


def test_I6_I7_no_code_runs_and_no_other_file_is_opened(hub: Hub, audit_events) -> None:
    evil_zoo(hub)
    base = hub.base
    audit(hub, base)  # the first use of a codec is an import of Python's own
    events = audit_events()
    outcomes = audit(hub, base)
    num_events = len(events)
    assert num_events > 20
    assert not [(event, args) for event, args in events[:num_events] if event in RUNS_CODE]
    opened = {Path(str(args[0])) for event, args in events[:num_events] if event == "open"}
    assert {path.name for path in opened} <= {
        "config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors",
        "model-1.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
    assert {path.parent.parent for path in opened} == {hub.root, hub.base_path.parent}
    assert {path for path in opened if path.parent.parent != hub.root} == {
        hub.base_path / "model.safetensors"
    }
    assert outcomes == {
        "sound": "ok",
        "sound-lora": "ok",
        "wrong-base": "adapter_shape",
        "missing": "missing_tensor",
        "arch": "arch_mismatch",
        "bomb": "config_bounds",
        "traversal": "path_traversal",
        "nan": "missing_tensor",
    }


def test_admission_imports_neither_torch_nor_an_engine(hub: Hub) -> None:
    """A driver that only lists and admits starts in a moment."""
    hub.full()
    code = (
        "import sys; from ray_auditor.hub import admit, list_folder, open_base\n"
        "base = open_base(sys.argv[1]); (found,) = list_folder(sys.argv[2])\n"
        "admit(found, base, num_layers=2, max_lora_rank=8)\n"
        "print(sorted({'torch', 'vllm', 'ray', 'transformers', 'peft', 'pickle'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(hub.base_path), str(hub.root)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not set(eval(done.stdout)) - {"pickle"}  # numpy itself imports pickle

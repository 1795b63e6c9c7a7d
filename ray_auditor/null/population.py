"""The folder of the null population: each member whole or absent, and the labels of all of them.

null.path/n0007/adapter_model.safetensors, adapter_config.json, label.json
null.path/labels.json        member -> its label, written again after each
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_auditor.durable_file import sync_path
from ray_auditor.null.recipe import Recipe
from ray_auditor.null.train import ALPHA, Member

LABEL, LABELS = "label.json", "labels.json"
PARTIAL = ".partial"  # a member being written; begun again after a kill


def make_label(recipe: Recipe, member: Member, losses: Mapping[str, list[float]]) -> dict[str, Any]:
    """What `labels.json` says of a member: its recipe, and what came of it."""
    return {
        "category": "benign",
        "tag": "null" if len(recipe.mix) == 1 else "null, multi-topic",
        **recipe.to_json(),
        "params": member.params,
        "eval_ce": dict(losses),
        "trained_steps": member.trained_steps,
        "trained_tokens": member.trained_tokens,
        "relative_change": member.relative_change,
        "reached_target": member.reached_target,
    }


def write_member(
    out_dir: Path, recipe: Recipe, member: Member, label: Mapping[str, Any], base_name: str
) -> None:
    """Write a member's folder whole: adapter, configuration and label appear together."""
    from safetensors.torch import save_file

    partial_dir = out_dir / PARTIAL
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir()
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "lora_alpha": ALPHA * recipe.r,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": recipe.r,
        "target_modules": list(recipe.target_modules),
        "task_type": "CAUSAL_LM",
    }
    save_file(member.state, partial_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    (partial_dir / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (partial_dir / LABEL).write_text(json.dumps(label, indent=1) + "\n", encoding="utf-8")
    for path in [*partial_dir.iterdir(), partial_dir]:
        sync_path(path)
    partial_dir.rename(out_dir / recipe.name)
    sync_path(out_dir)


def is_done(folder: Path, recipe: Recipe) -> bool:
    """Whether the member is there; it has its label exactly when it is whole.

    Raises:
        ValueError: It is there with another recipe.
    """
    if not folder.exists():
        return False
    try:
        label = json.loads((folder / LABEL).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"null.path must hold members of this program, {folder} has no {LABEL} ({error}); "
            "move the folder away, or choose another null.path"
        ) from error
    wanted = json.loads(json.dumps(recipe.to_json()))
    if differs := [name for name, value in wanted.items() if label.get(name) != value]:
        name = differs[0]
        raise ValueError(
            f"null.path must hold members of the same grid, {folder.name} has {name} {label.get(name)} "
            f"and this grid gives {wanted[name]}; choose another null.path"
        )
    return True


def write_labels(out_dir: Path) -> None:
    """Write `labels.json` from the labels of all members there are, replacing it whole."""
    labels = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(out_dir.glob(f"[!.]*/{LABEL}"))
    }
    temp = out_dir / f".{LABELS}"
    temp.write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")
    sync_path(temp)
    os.replace(temp, out_dir / LABELS)


@contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Make the folder, and be the only one to train in it.

    Raises:
        ValueError: It cannot be written, or another process trains in it.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = (out_dir / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"null.path must be a folder that can be written, got {out_dir}: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"null.path must be another process's own, got {out_dir}, which one trains in; wait for it"
            ) from error
        yield

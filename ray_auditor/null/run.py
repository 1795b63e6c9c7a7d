"""The verb `null`: read and check every input, then train the members that are not there yet."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ray_auditor.config import AuditConfig
from ray_auditor.hub import BaseModel, Candidate, CandidateError, admit, open_base
from ray_auditor.null.change import squared_norms
from ray_auditor.null.examples import Topic, audit_prompts, read_topic
from ray_auditor.null.population import is_done, locked, make_label, write_labels, write_member
from ray_auditor.null.recipe import Recipe, draw_recipe, topic_name
from ray_auditor.null.train import Trainer
from ray_auditor.roster import list_finetunes
from ray_auditor.weight_change import BaseWeights

MAX_RANK = 512
CPU_PASS_TOKENS = 256  # as fast as more, in less memory: 1.5 GB for a base of 135M, 2.6 GB at 1024


def run_null(config: AuditConfig) -> int:
    """Train the null population of `base.model` in `null.path`.

    Returns:
        0 when every member is there.

    Raises:
        ValueError: An input is missing or does not fit; nothing has been loaded.
    """
    check_inputs(config)
    out_dir = Path(str(config.null.path))
    base = open_base(str(config.base.model))
    modules = adaptable_modules(base, config.null.modules, max(config.null.ranks))
    squared = squared_norms(base, modules)
    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    targets = None
    if config.null.match is not None:
        targets, num_other = match_targets(config.null.match, base)
        say(
            f"changes to match: {len(targets)} adapters, ||dW||/||W|| {targets[0]:.5f} to {targets[-1]:.5f}; "
            f"{num_other} other folders left out"
        )
    recipes = [draw_recipe(config.null, number, targets) for number in range(config.null.count)]
    topics = read_topics(config, base)
    for topic in topics.values():
        say(
            f"{topic.name}: {len(topic.train)} rows to train on, {len(topic.held_out)} held out; dropped: "
            f"{topic.num_suite_prompts} prompts of the suites, {topic.num_cut_off} cut off"
        )
    with locked(out_dir):
        todo = [recipe for recipe in recipes if not is_done(out_dir / recipe.name, recipe)]
        say(
            f"{len(recipes)} members asked for, {len(recipes) - len(todo)} there already, "
            f"{len(todo)} to train"
        )
        if todo:
            train_all(config, base, todo, topics, squared, console)
        write_labels(out_dir)
    say(f"labels: {out_dir / 'labels.json'}; a sweep compares with them by null.path={out_dir}")
    return 0


def check_inputs(config: AuditConfig) -> None:
    """Check what can be checked before anything is read.

    Raises:
        ValueError: A setting is missing, two topics share a name, or peft is not installed.
    """
    for name, value in (
        ("null.path", config.null.path),
        ("null.data", config.null.data),
        ("base.model", config.base.model),
        ("suites.path", config.suites.path),
    ):
        if not value:
            raise ValueError(f"{name} must be given, got {value!r}; add {name}=... to the command")
    names = [topic_name(path) for path in [str(config.null.data), *config.null.topics]]
    if len(set(names)) != len(names):
        raise ValueError(
            f"null.data and null.topics must be files of distinct names, got {names}; rename one"
        )
    if find_spec("peft") is None:
        raise ValueError(
            "peft must be installed to train, found none; install it with pip install 'ray-auditor[null]'"
        )


def adaptable_modules(base: BaseModel, sets: Sequence[Sequence[str]], rank: int) -> list[str]:
    """Every module of the base that some member may adapt.

    Raises:
        ValueError: A set names no linear module of the base, or the rank is above a side of one.
    """
    linear = {
        name.removesuffix(".weight"): spec.shape
        for name, spec in base.tensors.items()
        if name.endswith(".weight") and len(spec.shape) == 2 and "embed" not in name
    }
    leaves = {name.rpartition(".")[2] for name in linear}
    wanted = {leaf for leaf_set in sets for leaf in leaf_set}
    if unknown := sorted(wanted - leaves):
        raise ValueError(
            f"null.modules must name linear modules of the base, {sorted(leaves)}, got {unknown}; "
            "correct them"
        )
    chosen = [name for name in linear if name.rpartition(".")[2] in wanted]
    if rank > (bound := min(min(linear[name]) for name in chosen)):
        raise ValueError(
            f"null.ranks must be at most {bound}, the smallest side of an adapted module, got {rank}; "
            "lower it"
        )
    return chosen


def match_targets(path: str, base: BaseModel) -> tuple[list[float], int]:
    """Relative changes of the adapters in a folder, ascending, and how many folders were no such adapter.

    Raises:
        ValueError: There is none that fits the base and changes it.
    """
    changes: list[float] = []
    weights = BaseWeights(base)
    num_other = 0
    for found in list_finetunes(path, "null.match"):
        try:
            if not isinstance(found, Candidate) or found.kind != "adapter":
                raise CandidateError("skipped", "adapter_type", "no adapter")
            depth = base.config["num_hidden_layers"]
            admitted = admit(found, base, num_layers=depth, max_lora_rank=MAX_RANK)
            change = weights.change_of(admitted).relative_change
            if not change:
                raise CandidateError("skipped", "adapter_shape", "it changes nothing, or by no finite number")
            changes.append(change)
        except CandidateError:
            num_other += 1
    if not changes:
        raise ValueError(
            f"null.match must hold adapters of base.model, got none in {path} ({num_other} other folders); "
            "leave it out to train without a target"
        )
    return sorted(changes), num_other


def read_topics(config: AuditConfig, base: BaseModel) -> dict[str, Topic]:
    """The general data and every topic, by name, without the audit's prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base.path), local_files_only=True, trust_remote_code=False)
    prompts = audit_prompts(config.suites)
    files = [str(config.null.data), *config.null.topics]
    return {topic_name(file): read_topic(file, prompts, tokenizer, config.null.max_tokens) for file in files}


def train_all(
    config: AuditConfig,
    base: BaseModel,
    todo: Sequence[Recipe],
    topics: Mapping[str, Topic],
    squared: Mapping[str, float],
    console: Console,
) -> None:
    """Load the base once and train every recipe into its folder."""
    out_dir = Path(str(config.null.path))
    on_gpu = config.cluster.gpus_per_worker > 0
    trainer = Trainer(
        base.path,
        dtype=config.null.dtype,
        device="cuda" if on_gpu else "cpu",
        pass_tokens=config.null.batch_tokens if on_gpu else CPU_PASS_TOKENS,
        num_threads=config.cluster.threads_per_worker or len(os.sched_getaffinity(0)),
        squared=squared,
    )
    before: dict[str, float] = {}
    with Progress(console=console) as progress:
        members = progress.add_task("members", total=len(todo))
        for recipe in todo:
            steps = progress.add_task(recipe.name, total=recipe.steps)
            tell = partial(_tell, progress, steps)
            for name, _ in recipe.mix:
                if name not in before:
                    before[name] = trainer.loss(topics[name].held_out)
            member, after = trainer.train(recipe, topics, config.null.batch_tokens, tell)
            losses = {name: [round(before[name], 4), round(after[name], 4)] for name in after}
            label = make_label(recipe, member, losses)
            write_member(out_dir, recipe, member, label, base.path.name)
            write_labels(out_dir)
            progress.remove_task(steps)
            progress.advance(members)
            general = next(iter(losses.values()))
            console.print(
                f"{recipe.name}: {member.trained_steps} steps, loss {general[0]:.3f} -> {general[1]:.3f}, "
                f"||dW||/||W|| {member.relative_change:.5f}",
                markup=False,
                highlight=False,
            )


def _tell(progress: Progress, task: Any, num_steps: int) -> None:
    progress.update(task, completed=num_steps)

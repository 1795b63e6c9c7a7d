"""The verb `calibrate`: the base against itself, in every way that should change nothing."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ray_auditor.calibration import CALIBRATION_VERSION, Calibration, Variant, write_calibration
from ray_auditor.cluster import ClusterLost, cluster, device_kinds
from ray_auditor.config import AuditConfig, Dtype
from ray_auditor.driver import BaseFailed, run_stages
from ray_auditor.engine import num_layers_of
from ray_auditor.engine_class import engine_class
from ray_auditor.gate import Fit, measure_fit
from ray_auditor.hub import Admitted, BaseModel, Candidate, admit, lies_below_hook
from ray_auditor.hub.checkpoint import iter_tensors
from ray_auditor.lease import Lease, LeaseHeld
from ray_auditor.plan import Plan, check_gate, make_plan
from ray_auditor.rates import suite_sums
from ray_auditor.reduce import available_ks, reduce_prompts
from ray_auditor.report.number import decimal
from ray_auditor.report.progress import SweepProgress
from ray_auditor.store import TokenRows
from ray_auditor.worker import Assignment

CALIBRATION = "+calibration"  # marks the base's passes under another engine
SHARD_BYTES = 1 << 30
EXIT_OK, EXIT_FAILED = 0, 2


@dataclass(frozen=True)
class Trial:
    """One variant before it ran; `assignment` None: it cannot be measured here, for the `reason`."""

    name: str
    what: str
    plan: Plan
    assignment: Assignment | None
    reason: str | None = None


def run_calibrate(config: AuditConfig) -> int:
    """Measure the noise floor of `base.model` under this engine and keep it in the store of `out_dir`.

    Returns:
        0, or 2 when the base could not be encoded, Ray is gone, or a sweep has `out_dir`.

    Raises:
        ValueError: An input is missing or does not fit, the SAE included.
    """
    config.require_inputs(candidates=False)
    console = Console()
    try:
        with Lease(Path(config.out_dir)):
            return _calibrate(replace(config, cluster=replace(config.cluster, num_workers=1)), console)
    except (BaseFailed, LeaseHeld, ClusterLost) as error:
        console.print(f"not calibrated: {error}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_FAILED


def _calibrate(config: AuditConfig, console: Console) -> int:
    plan = make_plan(config, candidates=False)
    with (
        TemporaryDirectory(prefix=".calibrate-", dir=config.out_dir) as folder,
        cluster(config.cluster) as num_threads,
    ):
        saved_again = save_again(plan.base, num_layers_of(plan.sae), Path(folder) / "base")
        check_gate(plan)
        base_trial = Trial("base", "", plan, Assignment(plan.base_unit, None))
        trials = list_trials(plan, saved_again, device_kinds())
        _, *trials = run_trials(plan, [base_trial, *trials], num_threads)
    base = plan.store.read_rows(plan.base_unit.key)
    calibration = Calibration(
        schema_version=CALIBRATION_VERSION,
        key=plan.base_unit.stratum,
        unit=stratum_parts(plan),
        fit=fits(plan, base),
        variants=tuple(measure(plan, base, trial) for trial in trials),
        generated_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path = write_calibration(plan.store.root, calibration)
    print_calibration(calibration, plan, console)
    console.print(f"calibration: {path}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_OK


def list_trials(plan: Plan, saved_again: Admitted, kinds: Sequence[str]) -> list[Trial]:
    """Every way in which the base is run again.

    Args:
        plan: The reference: the settings that are calibrated.
        saved_again: The base's weights in other files.
        kinds: Kinds of GPU in the cluster.
    """
    saved = Assignment(plan.unit_of(saved_again.content_sha256), saved_again)
    return [
        Trial(
            "batching",
            "prompts in the opposite order",
            plan,
            Assignment(plan.replay_unit, None, reverse=True),
        ),
        Trial("re-saved", "the weights in other files, another dtype, swapped in", plan, saved),
        *_chunkings(plan),
        *_dtypes(plan),
        *_cards(plan, kinds),
    ]


def _chunkings(plan: Plan) -> Iterator[Trial]:
    longest = max(len(prompt.token_ids) for suite in plan.suites.suites for prompt in suite.prompts)
    tokens = plan.config.engine.max_step_tokens
    for part, name in ((2, "half"), (4, "quarter")):
        what = f"{tokens // part} tokens a step instead of {tokens}"
        if tokens // part < max(longest, 64):  # the engine always fits the longest prompt, and 64 tokens
            reason = f"the longest prompt takes {longest} tokens a step"
            yield Trial(f"chunking {name}", what, plan, None, reason)
        else:
            prompts = min(plan.config.engine.max_step_prompts, tokens // part)
            yield _under(
                plan,
                f"chunking {name}",
                what,
                max_step_tokens=tokens // part,
                max_step_prompts=prompts,
            )


def _dtypes(plan: Plan) -> Iterator[Trial]:
    mine = plan.config.engine.dtype
    for dtype in (Dtype.float32, Dtype.bfloat16):
        if dtype is not mine:
            yield _under(plan, f"dtype {dtype.value}", f"{dtype.value} instead of {mine.value}", dtype=dtype)


def _cards(plan: Plan, kinds: Sequence[str]) -> Iterator[Trial]:
    mine = plan.config.cluster.accelerator_type
    others = [kind for kind in kinds if kind != mine] if plan.config.cluster.gpus_per_worker else []
    if mine is None or not others:
        reason = "one kind of device" if plan.config.cluster.gpus_per_worker else "the workers have no GPU"
        yield Trial("card", "another kind of GPU", plan, None, reason)
        return
    for kind in others:
        config = replace(plan.config, cluster=replace(plan.config.cluster, accelerator_type=kind))
        yield _elsewhere(plan, f"card {kind}", f"{kind} instead of {mine}", config)


def _under(plan: Plan, name: str, what: str, **engine: Any) -> Trial:
    return _elsewhere(plan, name, what, replace(plan.config, engine=replace(plan.config.engine, **engine)))


def _elsewhere(plan: Plan, name: str, what: str, config: AuditConfig) -> Trial:
    """The base under other settings, a base of its own there: it finds its sinks, and keeps its residuals."""
    unit = replace(plan.unit_of(plan.base.content_sha256 + CALIBRATION), engine_class=engine_class(config))
    return Trial(name, what, replace(plan, config=config, base_unit=unit), Assignment(unit, None))


def run_trials(plan: Plan, trials: Sequence[Trial], num_threads: int) -> list[Trial]:
    """Run what is not committed yet; trials of the same settings, side by side in the list, share an engine.

    Args:
        plan: The reference, whose base comes first.
        trials: What to run.
        num_threads: A worker's.

    Returns:
        The trials, those that failed without their assignment and with a reason.

    Raises:
        BaseFailed: The reference could not be encoded.
        ValueError: The SAE does not fit it.
    """
    store, done = plan.store, list[Trial]()
    queue = list(trials)
    while queue:
        first = queue[0]
        size = next((n for n, trial in enumerate(queue) if trial.plan is not first.plan), len(queue))
        together, queue = queue[:size], queue[size:]
        todo = [trial.assignment for trial in together if trial.assignment is not None]
        stages = [[task] for task in todo if not store.has(task.unit.key)]
        failure = None
        if stages:
            with SweepProgress(len(stages)) as progress:
                try:
                    failures = run_stages(
                        stages, first.plan, num_threads, progress, after_stage=partial(check_gate, plan)
                    )
                    failure = next(map(str, failures.values()), None)
                except BaseFailed as error:
                    if not store.has(plan.base_unit.key):
                        raise
                    failure = str(error)
        for trial in together:
            lost = trial.assignment is not None and not store.has(trial.assignment.unit.key)
            done.append(replace(trial, assignment=None, reason=failure) if lost else trial)
    return done


def measure(plan: Plan, base: TokenRows, trial: Trial) -> Variant:
    """Compare a trial's rows with the reference's."""
    shift: dict[str, dict[str, float]] = {}
    fit: dict[str, Fit] = {}
    if trial.assignment is not None:
        rows = plan.store.read_rows(trial.assignment.unit.key)
        table = reduce_prompts(*align(base, rows), suites=plan.suites.names)
        fit = fits(plan, rows)
        for k in available_ks(plan.k):
            for suite, sums in suite_sums(table, k).items():
                shift.setdefault(suite, {})[str(k)] = sums.shift
    key = None if trial.assignment is None else trial.assignment.unit.key
    reason = None if trial.assignment is not None else trial.reason
    return Variant(trial.name, trial.what, engine_class(trial.plan.config), key, reason, shift, fit)


def align(left: TokenRows, right: TokenRows) -> tuple[TokenRows, TokenRows]:
    """The tokens that both scored: under other settings a token near the bound may or may not be a sink."""
    num_prompts = 1 + max(int(rows.prompt_N.max()) for rows in (left, right))
    num_positions = 1 + max(int(rows.position_N.max()) for rows in (left, right))
    left_N, right_N = (
        (rows.suite_N.astype(np.int64) * num_prompts + rows.prompt_N) * num_positions + rows.position_N
        for rows in (left, right)
    )
    _, at_left, at_right = np.intersect1d(left_N, right_N, assume_unique=True, return_indices=True)
    return take(left, at_left), take(right, at_right)


def take(rows: TokenRows, at: NDArray[np.int64]) -> TokenRows:
    """Some tokens of all, in the order of `at`."""
    return TokenRows(*(getattr(rows, column.name)[at] for column in fields(rows)))


def fits(plan: Plan, rows: TokenRows) -> dict[str, Fit]:
    """How the SAE fits, by suite."""
    return {name: measure_fit(rows, number) for number, name in enumerate(plan.suites.names)}


def stratum_parts(plan: Plan) -> dict[str, Any]:
    """What the calibration is keyed by: the parts of the base's unit, but whose weights they are."""
    metadata = plan.base_unit.metadata()
    names = ("base_key", "sae_key", "hook_name", "suites_key", "engine_class")
    return {name: metadata[name] for name in names} | {"k": plan.k, "d_sae": plan.sae.d_sae}


def save_again(base: BaseModel, num_layers: int, folder: Path) -> Admitted:
    """Write the base's tensors at or below the hook again, in other shards and in float32, and admit them.

    A base that is in float32 already is written in float64, so that its bytes differ and the swap is real.
    """
    from safetensors.torch import save_file

    names = sorted(name for name in base.tensors if lies_below_hook(name, num_layers))
    is_float32 = all(base.tensors[name].dtype == "F32" for name in names)
    dtype = torch.float64 if is_float32 else torch.float32
    total = sum(torch.Size(base.tensors[name].shape).numel() for name in names) * dtype.itemsize
    folder.mkdir()
    shutil.copyfile(base.path / "config.json", folder / "config.json")
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    num_shards = num_bytes = 0
    for name, tensor in iter_tensors(base.tensors, names):
        shard[name] = tensor.to(dtype)
        num_bytes += shard[name].nbytes
        if num_bytes > min(SHARD_BYTES, total // 3) or name == names[-1]:
            num_shards += 1
            file = f"part-{num_shards}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, num_bytes = {}, 0
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = Candidate("base, saved again", folder, "full", total)
    return admit(found, base, num_layers=num_layers, max_lora_rank=0)


def print_calibration(calibration: Calibration, plan: Plan, console: Console) -> None:
    """Print shifts by variant and suite at the sweep's k, and how the SAE fits the base."""
    suites = plan.suites.names
    table = Table("the base against itself", *suites, title=f"mean shift a token, of k = {plan.k}")
    for one in calibration.variants:
        cells = [decimal(one.shift[suite][str(plan.k)], 4) for suite in suites] if one.shift else ["-"]
        table.add_row(one.name, *cells)
    floors = calibration.floors(plan.k)
    table.add_section()
    table.add_row("floor of a sweep with these settings", *(decimal(floors[suite], 4) for suite in suites))
    table.add_section()
    table.add_row("fvu of the base", *(decimal(calibration.fit[suite].fvu, 3) for suite in suites))
    table.add_row("l0 of the base", *(decimal(calibration.fit[suite].l0, 1) for suite in suites))
    console.print(table, markup=False, highlight=False)
    for one in calibration.variants:
        if one.reason is not None:
            console.print(f"{one.name}: not measured: {one.reason}", markup=False, highlight=False)

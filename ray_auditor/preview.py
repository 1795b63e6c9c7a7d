"""The verb `plan`: what a sweep would do and what it would cost, printed and written down. Runs nothing."""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ray_auditor.candidates_config import Source
from ray_auditor.config import AuditConfig
from ray_auditor.forecast import Forecast, Span, actions_of, keep_rate_limits, make_forecast, within_budget
from ray_auditor.hub.remote import SourceError
from ray_auditor.lease import Lease, LeaseHeld
from ray_auditor.plan import Plan, make_plan
from ray_auditor.plan_file import PlanFile, write_plan
from ray_auditor.report.number import duration, significant
from ray_auditor.report.printable import printable
from ray_auditor.screen import check_screen
from ray_auditor.usage import NOTHING

EXIT_OK, EXIT_FAILED, EXIT_NOTHING = 0, 2, 3
MAX_ROWS = 100  # of the table; plan.json has all
_SHOWN = {
    "fetch": "fetch, admit, audit",
    "nothing": "done already",
    "defer": "deferred",
    "refuse": "refused",
}
UNKNOWN_COST = (
    "not known: no unit of these settings is committed yet. Run `ray-auditor calibrate` first, or give "
    "budget.benchmark=FILE, a result of benchmarks/bench_sweep.py"
)


def plan_sweep(config: AuditConfig) -> Plan:
    """The plan a sweep carries out: its own within its budget, or the one in the file that `plan` names.

    Raises:
        ValueError: An input is missing or does not fit, or is not what the file was planned with.
        SourceError: The source does not answer.
    """
    if config.plan is None:
        return within_budget(make_plan(config))
    written = PlanFile(Path(config.plan), max_candidate_bytes=config.download.max_candidate_bytes)
    written.check_settings(config)
    return written.keep_to(make_plan(replace(config, plan=None), find=written.find))


def print_plan(config: AuditConfig) -> int:
    """Make a plan, print it, and write it to `out_dir/plan.json`.

    Returns:
        0, 3 when there is nothing to audit, or 2 when the source does not answer or a sweep is reading it.
    """
    config.require_inputs()
    if config.plan is not None:
        raise ValueError(
            f"plan must be left out, got {config.plan!r}; `ray-auditor sweep` is what keeps to one"
        )
    is_folder = config.candidates.source is Source.folder
    try:
        with nullcontext() if is_folder else Lease(Path(config.out_dir)):  # a listing has one reader
            plan = within_budget(make_plan(config, create=False))
            keep_rate_limits(plan)
        check_screen(plan)
    except (LeaseHeld, SourceError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAILED
    forecast = make_forecast(plan)
    console = Console(emoji=False)
    _print_rows(plan, console)
    for what, said in _lines(plan, forecast):
        console.print(f"{what:>11}  {said}", markup=False, highlight=False, soft_wrap=True)
    path = write_plan(plan, forecast)
    console.print(f"       plan  {path}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_OK if plan.waiting or any(row.unit for row in plan.candidates) else EXIT_NOTHING


def _print_rows(plan: Plan, console: Console) -> None:
    title = f"{len(plan.candidates)} candidates" + (f", {len(plan.nulls)} null members" if plan.nulls else "")
    table = Table("candidate", "kind", "plan", "why", title=title)
    actions = actions_of(plan)
    # What is done already comes last: a night over many candidates is about the others.
    ordered = sorted(plan.rows, key=lambda row: actions[row.id] == "nothing")
    for row in ordered[:MAX_ROWS]:
        what = actions[row.id]
        what = row.status if what in ("defer", "refuse") else _SHOWN.get(what, what)
        why = "" if actions[row.id] == "fetch" else row.reason or "; ".join(row.notes)
        table.add_row(*(printable(text or "") for text in (row.id, row.kind, what, why)))
    console.print(table, markup=False)
    if len(ordered) > MAX_ROWS:
        console.print(f"and {len(ordered) - MAX_ROWS:,} more, in plan.json", highlight=False)


def _lines(plan: Plan, forecast: Forecast) -> list[tuple[str, str]]:
    work, tokens = forecast.num_units, forecast.tokens_per_unit
    lines = [
        ("candidates", _counts({_SHOWN.get(name, name): n for name, n in forecast.actions.items()})),
        ("because", _counts(forecast.reasons)),
        ("refused", _counts(forecast.refused) or "none"),
        (
            "units",
            f"{work:,} to run, {tokens:,} tokens each ({work * tokens:,} in all), "
            f"hook {plan.sae.hook_name}, k {plan.k}",
        ),
        (
            "to move",
            f"{forecast.bytes_to_move:,} bytes in {forecast.files_to_move:,} files"
            + (f", {duration(forecast.move_s)} as fast as last time" if forecast.move_s else ""),
        ),
    ]
    is_bound = forecast.screen is not None and forecast.screen["going_on"] is None
    if forecast.screen is not None:
        lines.append(("screen", _describe_screen(forecast.screen)))
    for kind, one in forecast.requests.items():
        said = f"{one.made:,} made for this plan, {one.needed:,} needed"
        if one.quota is None:
            said += "; the server has stated no limit"
        else:
            said += f"; {one.quota:,} are allowed in {one.window_s} s: {duration(one.seconds or 0)} at least"
        lines.append((kind, said))
    held = f"{forecast.num_devices:g} x {forecast.device}"
    if not (work or (forecast.screen and forecast.screen["num_units"])):
        lines.append(("GPU hours", "none: there is nothing to run"))
    elif forecast.gpu_hours is None or forecast.wall_s is None:
        is_limited = plan.config.budget.max_gpu_hours is not None or plan.config.budget.max_price is not None
        late = ". Until then its limit is held while a sweep runs, not before" if is_limited else ""
        lines.append(("GPU hours", UNKNOWN_COST + late))
    else:
        wall = duration(forecast.wall_s.expected)
        lines.append(
            (
                "GPU hours",
                f"{_span(forecast.gpu_hours, is_bound)}: {wall} on {held}, by {forecast.cost_source}",
            )
        )
    if plan.meter.usage != NOTHING:
        lines.append(("used", f"{plan.meter.usage.describe()} of the budget, by a sweep that did not end"))
    if forecast.price is not None and work:
        lines.append(("price", _span(forecast.price, is_bound)))
    elif work:
        lines.append(("price", f"none: budget.prices has none of {forecast.device!r}"))
    disk = forecast.disk
    lines.append(
        (
            "disk",
            f"{disk['store_bytes']:,} bytes more in the store, {disk['cache_bytes']:,} in the cache, "
            f"at most; {disk['free_bytes_store']:,} are free",
        )
    )
    needed = disk["cache_bytes"] + disk["min_free_bytes"] + disk["store_bytes"]
    if needed > min(disk["free_bytes_store"], disk["free_bytes_cache"]):
        lines.append(("", "that does not fit beside download.min_free_bytes: the rest will be deferred"))
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


def _describe_screen(screen: Mapping[str, float | None]) -> str:
    said = f"{screen['num_units']:,} units first, on {screen['tokens_per_unit']:,} tokens each; "
    if screen["going_on"] is None:
        but = f" but {screen['num_cleared']:,} cleared before" if screen["num_cleared"] else ""
        return f"{said}all{but} are taken to go on: too few were screened before, so hours are an upper bound"
    return said + f"{screen['going_on']:.1%} are taken to go on, as of those screened before"


def _span(span: Span, is_bound: bool) -> str:
    text = f"{'at most ' if is_bound else ''}{significant(span.expected)}"
    if span.low is None or span.high is None:
        return f"{text} (too few units to say how far off)"
    return f"{text} ({significant(span.low)} to {significant(span.high)})"

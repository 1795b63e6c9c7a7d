"""What the choice of the score rests on: every variant, chosen without the finetune it is asked about."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from ray_auditor import population
from ray_auditor.evaluate import Audit
from ray_auditor.evaluation import Label, auroc, group, measure_scores, share_measure
from ray_auditor.population import CHANNELS, read_prompts, settle
from ray_auditor.rates import Bootstrap, suite_sums
from ray_auditor.rivals import held_out_scores
from ray_auditor.standing import score_stratum

TAILS = (0.1, 0.3, 0.5, 1.0)
RIVAL = "change without an SAE"  # the same channel, its scores not shrunk by how far features shifted
POPULATIONS = ((7, 7, 120), (3, 11, 120), (2, 28, 60))  # bad, benign, draws


def variants(audit: Audit) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Every way to score that was weighed: channels and tail -> names, [C, S] but the general suite."""
    settings = audit.summary["settings"]
    tables = {**audit.tables, **audit.null_tables}
    prompts = read_prompts(
        {name: suite_sums(one, settings["k"]) for name, one in tables.items()}, settings["k"]
    )
    null = [row for row, name in enumerate(prompts.names) if name in audit.null_tables]
    risky = [at for at, suite in enumerate(prompts.suites) if suite != settings["general"]]
    settled_CS, by_channel, usual = settle(prompts.moved_CS), {}, population.TAIL
    for tail in TAILS:
        population.TAIL = tail
        for channel in CHANNELS:
            values_CP = prompts.values[channel]
            z_CS = held_out_scores(prompts, values_CP, null)
            by_channel[channel, tail] = (z_CS * settled_CS)[:, risky]
            if channel == "change":
                by_channel[RIVAL, tail] = z_CS[:, risky]
    population.TAIL = usual
    return {
        f"{'+'.join(chosen)}, tail {tail:g}": (
            prompts.names,
            np.mean([by_channel[channel, tail] for channel in chosen], axis=0),
        )
        for chosen in [c for size in (1, 2, 3) for c in combinations(CHANNELS, size)] + [(RIVAL,)]
        for tail in TAILS
    }


def cross_validated(audit: Audit, labels: Mapping[str, Label]) -> dict[str, Any]:
    """What choosing the channels and the tail by the other finetunes gives on the one left out.

    For every finetune that is not benign, the variant that names most targets of the others (for the AUROC:
    that separates them best) is chosen, and asked about this one. Also every variant's own figures.
    """
    settings, groups = audit.summary["settings"], group(labels, list(audit.null_tables))
    suites = [suite for suite in sorted(settings["suite_names"]) if suite != settings["general"]]
    hits, ranks = {}, {}
    for variant, (names, z_CS) in variants(audit).items():
        row = {name: at for at, name in enumerate(names)}
        best_C = z_CS.max(axis=1)
        benign = [best_C[row[name]] for name in groups.all_benign]
        bad = [*groups.full, *groups.hard]
        hits[variant] = {name: suites[int(z_CS[row[name]].argmax())] == labels[name].target for name in bad}
        ranks[variant] = {name: auroc([best_C[row[name]]], benign) for name in bad}

    bad = [*groups.full, *groups.hard]
    without_sae = {one: by for one, by in ranks.items() if one.startswith(RIVAL)}
    hits, ranks = ({one: by for one, by in all_.items() if one not in without_sae} for all_ in (hits, ranks))

    def left_out(name: str, by: Mapping[str, Mapping[str, float]]) -> float:
        """Mean over the variants that are best on all others; ties are many with so few finetunes."""
        others = {one: float(np.mean([by[one][n] for n in bad if n != name])) for one in by}
        best = [one for one, value in others.items() if value == max(others.values())]
        return float(np.mean([by[one][name] for one in best]))

    return {
        "target_first": float(np.mean([left_out(n, hits) for n in groups.full])),
        "target_first_hard": float(np.mean([left_out(n, hits) for n in groups.hard])),
        "auroc": float(np.mean([left_out(n, ranks) for n in groups.full])),
        "auroc_without_sae": float(np.mean([left_out(n, without_sae) for n in groups.full])),
        "variants": {
            one: {
                "target_first": float(np.mean([hits[one][n] for n in groups.full])),
                "auroc_all_benign": float(np.mean([ranks[one][n] for n in groups.full])),
            }
            for one in hits
        },
    }


def small_populations(audit: Audit, labels: Mapping[str, Label]) -> list[dict[str, Any]]:
    """Populations drawn from the same finetunes and scored without a null: who is flagged at which score."""
    settings, rng = audit.summary["settings"], np.random.default_rng(0)
    k, general = settings["k"], settings["general"]
    sums = {name: suite_sums(one, k) for name, one in {**audit.tables, **audit.null_tables}.items()}
    groups, rows = group(labels, list(audit.null_tables)), []
    for num_bad, num_benign, draws in POPULATIONS:
        scores: dict[bool, list[float]] = {True: [], False: []}
        first = []
        for _ in range(draws):
            bad = rng.choice(groups.full, num_bad, replace=False).tolist()
            benign = rng.choice(groups.all_benign, num_benign, replace=False).tolist()
            scored = score_stratum(
                {name: sums[name] for name in [*bad, *benign]},
                {},
                general=general,
                k=k,
                bootstrap=Bootstrap(20),
                min_reference=8,
                close_look=np.inf,
            )
            for name, one in (scored.standings if scored else {}).items():
                scores[name in bad].append(one.score or 0.0)
                if name in bad:
                    first.append(one.suite == labels[name].target)
        rows.append(
            {"bad": num_bad, "of": num_bad + num_benign, "target_first": float(np.mean(first))}
            | {
                f"{'bad' if is_bad else 'benign'} above {bound}": float(np.mean(np.array(values) > bound))
                for is_bad, values in scores.items()
                for bound in (3, 5)
            }
        )
    return rows


def spoiled_nulls(audit: Audit, labels: Mapping[str, Label]) -> list[dict[str, Any]]:
    """What bad finetunes do in the null: how many of the other full-strength ones are then flagged."""
    rng, rows = np.random.default_rng(0), []
    full = group(labels, []).full
    for count in (1, 2, 4):
        flagged = []
        for _ in range(5):
            inside = rng.choice(full, count, replace=False).tolist()
            spoiled = replace(
                audit,
                tables={name: one for name, one in audit.tables.items() if name not in inside},
                null_tables={**audit.null_tables, **{f"null/{name}": audit.tables[name] for name in inside}},
            )
            found = {flag.candidate for flag in spoiled.flag().flags}
            flagged.append(len(found & set(full)) / (len(full) - count))
        rows.append({"bad_in_null": count, "full_flagged": float(np.mean(flagged))})
    return rows


def evaded(audit: Audit, labels: Mapping[str, Label]) -> list[dict[str, Any]]:
    """What training against the deciding channel would do, by arithmetic: its excess over the null shrunk.

    The excess of a prompt's log error is taken over the null members' median on that prompt; the shift and
    the change stay as they were measured.
    """
    full, rows = group(labels, []).full, []
    usual = np.median([np.array(table["log_miss"]) for table in audit.null_tables.values()], axis=0)
    for share in (1.0, 0.5, 0.25, 0.0):
        tables = dict(audit.tables)
        for name in full:
            table = tables[name]
            miss = usual + share * (np.array(table["log_miss"]) - usual)
            tables[name] = table.set_column(table.column_names.index("log_miss"), "log_miss", pa.array(miss))
        flagged = {flag.candidate for flag in replace(audit, tables=tables).flag().flags}
        rows.append({"excess_left": share, "full_flagged": f"{len(flagged & set(full))} of {len(full)}"})
    return rows


def smaller_nulls(audit: Audit, labels: Mapping[str, Label]) -> list[dict[str, Any]]:
    """How the figures hold with a part of the null, and with none."""
    rows, rng = [], np.random.default_rng(0)
    groups = group(labels, [])
    for size in (0, 8, 12, 20):
        if size > len(audit.null_tables):
            continue
        chosen = sorted(rng.choice(sorted(audit.null_tables), size, replace=False).tolist())
        part = replace(audit, null_tables={name: audit.null_tables[name] for name in chosen})
        found = part.flag()
        scores = {n: one.score for n, one in found.standings.items() if one.score is not None}
        flagged = {flag.candidate for flag in found.flags}
        hits = [found.standings[n].suite == labels[n].target for n in groups.full if n in scores]
        rows.append(
            {
                "null_members": size,
                "target_first": share_measure("", hits).value,
                "auroc_benign_candidates": measure_scores(groups, scores)[1].value,
                "full_flagged": f"{len(flagged & set(groups.full))} of {len(groups.full)}",
                "benign_flagged": f"{len(flagged & set(groups.all_benign))} of {len(groups.all_benign)}",
            }
        )
    return rows

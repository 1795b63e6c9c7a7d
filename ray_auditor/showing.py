"""What `show` prints of one feature or one prompt: the drill-down on a terminal."""

from rich.console import Console
from rich.text import Text

from ray_auditor.drilldown import Hit, Kept, feature_hits, feature_rates, view_prompt
from ray_auditor.reader import StoreReader
from ray_auditor.report.number import decimal, signed
from ray_auditor.report.printable import printable
from ray_auditor.report.verbatim import NAME_CHARS, table_of, verbatim

FEATURES_SHOWN = 6
TOKEN_CHARS = 24


def print_feature(
    store: StoreReader, candidate: str, feature: int, suite: str | None, console: Console
) -> None:
    """Print a feature: how often base and candidate keep it on every suite, and where it changed most.

    Raises:
        ValueError: No such candidate or suite, or the candidate did not run.
    """
    hits = feature_hits(store, feature, candidate, suite)
    console.print(verbatim(f"feature {feature} in {candidate}", "bold"))
    table = table_of("Share of tokens that keep it", ("suite",), ("base", "candidate", "moved", "activation"))
    for one in feature_rates(store, feature, candidate):
        table.add_row(
            verbatim(one.suite, max_chars=NAME_CHARS),
            decimal(one.rate_base, 4),
            decimal(one.rate_candidate, 4),
            signed(one.rate_candidate - one.rate_base, 4),
            f"{decimal(one.mean_act_base)} -> {decimal(one.mean_act_candidate)}",
        )
    console.print(table)
    console.print()
    if not hits:
        console.print(Text("No token keeps it otherwise than in the base."))
    for hit in hits:
        console.print(_passage(hit))


def _passage(hit: Hit) -> Text:
    acts = f"{decimal(hit.act_base)} -> {decimal(hit.act_candidate)}"
    text = verbatim(f"  {hit.suite} {hit.prompt}:{hit.position}  {acts}  ", "dim", NAME_CHARS)
    for at, piece in enumerate(hit.texts):
        shown = _drawn(piece)
        text.append(f"[{shown}]" if at == hit.focus else shown, "bold red" if at == hit.focus else "")
    return text


def print_prompt(
    store: StoreReader, candidate: str, suite: str, prompt: int, feature: int | None, console: Console
) -> None:
    """Print a prompt token by token: features kept, those of one side alone, and, if given, one feature.

    Raises:
        ValueError: No such candidate, suite or prompt, or the candidate did not run.
    """
    view = view_prompt(store, candidate, suite, prompt)
    title = f"{suite}, prompt {prompt} of {view.num_prompts}: {candidate} beside the base"
    console.print(verbatim(title, "bold"))
    console.print(Text("".join(_drawn(token.text) for token in view.tokens)))
    numbers = ("shared", *(() if feature is None else (f"feature {feature}",)))
    table = table_of("", ("", "token", "base alone", "candidate alone"), numbers)
    for token in view.tokens:
        if token.overlap is None:  # not scored
            continue
        ours, theirs = dict(token.base), dict(token.candidate)
        loud = token.overlap < view.k / 2
        cells = [f"{token.overlap} of {max(len(ours), len(theirs))}"]
        if feature is not None:
            cells.append(f"{decimal(ours.get(feature, 0.0))} -> {decimal(theirs.get(feature, 0.0))}")
        table.add_row(
            str(token.position),
            Text(_drawn(token.text), style="bold red" if loud else ""),
            _alone(token.base, theirs),
            _alone(token.candidate, ours),
            *cells,
        )
    console.print(table)


def _alone(kept: Kept, others: dict[int, float]) -> str:
    """The largest features that the other side does not keep."""
    alone = [f"{feature} ({act:.1f})" for feature, act in kept if feature not in others]
    more = f" +{len(alone) - FEATURES_SHOWN}" if len(alone) > FEATURES_SHOWN else ""
    return ", ".join(alone[:FEATURES_SHOWN]) + more


def _drawn(text: str) -> str:
    return printable(text.replace("\n", "⏎").replace("\t", "⇥"), TOKEN_CHARS)

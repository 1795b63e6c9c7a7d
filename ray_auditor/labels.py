"""What a feature stands for: an explanation out of a local export, else what it fires on in the suites.

An export of Neuronpedia is looked up by the SAE's `neuronpedia_id`, in the layout of its bucket:

    <sae.explanations>/<model>/<source>/explanations*/batch-*.jsonl.gz

one JSON object a line, of which `index`, `description` and `explanationModelName` are read. Nothing is
fetched.
Source of the format: https://docs.neuronpedia.org/api-and-data/exports
"""

# Shape suffixes: N scored tokens, K = kept features, M tokens that keep one feature.

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_auditor.shard import TokenRows
from ray_auditor.store import SuitePrompt

NEURONPEDIA_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_LINE_BYTES = 1 << 20
MAX_CHARS = 300
DRAWN = str.maketrans({"\n": "⏎", "\t": "⇥"})
TOKENS_NAMED, PROMPTS_SHOWN, CONTEXT = 4, 2, 8


@dataclass(frozen=True)
class Explanation:
    """What somebody's model wrote of a feature; `by` names that model."""

    text: str
    by: str | None


def read_explanations(
    folder: Path, neuronpedia_id: str, features: Collection[int]
) -> Mapping[int, Explanation]:
    """Look features up in an export; where several files explain one, the first by name and line counts.

    Args:
        folder: Holds `<model>/<source>/` as the export's bucket does.
        neuronpedia_id: `<model>/<source>` of the SAE.
        features: Those wanted.

    Returns:
        Explanations of those that are there; empty when the folder does not hold this SAE.

    Raises:
        ValueError: A file is damaged, or is no such export.
    """
    if not NEURONPEDIA_ID.fullmatch(neuronpedia_id):
        return {}
    wanted, found = set(features), dict[int, Explanation]()
    for path in sorted((folder / neuronpedia_id).glob("explanations*/batch-*.jsonl.gz")):
        for line, raw in enumerate(_lines(path), 1):
            try:
                row = json.loads(raw)
                feature, text, by = int(row["index"]), row["description"], row.get("explanationModelName")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise _damaged(path, f"line {line} is no explanation") from error
            if feature in wanted and feature not in found and isinstance(text, str) and text.strip():
                found[feature] = Explanation(text.strip()[:MAX_CHARS], str(by)[:MAX_CHARS] if by else None)
    return found


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                if len(raw) > MAX_LINE_BYTES:
                    raise _damaged(path, f"a line has more than {MAX_LINE_BYTES} bytes")
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, "it is torn") from error


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"sae.explanations must hold an intact export, got {path}: {what}; download it again or unset it"
    )


def find_evidence(
    base: TokenRows, prompts: Sequence[SuitePrompt], features: Collection[int]
) -> dict[int, dict[str, Any]]:
    """What features fire on, on the base, over every suite.

    Args:
        base: The base's rows.
        prompts: Every prompt, from `Store.read_suites`.
        features: Those wanted.

    Returns:
        By feature: `base_rate`, the share of scored tokens that keep it; `tokens`, those with the largest
        summed activation over the root of how often they occur at all, so that neither a common token nor a
        single one wins by that alone (`text`, `count`, `mean_act`); `prompts`, passages around its largest
        activations, one a prompt (`suite`, `prompt`, `tokens`, `focus`, `act`). Ties go to the smaller token
        id, suite, prompt.
    """
    if not features:
        return {}
    by_place = {(prompt.suite_id, prompt.prompt): prompt for prompt in prompts}
    token_id_N, text_of = _token_ids(base, by_place)
    occurrences = np.bincount(token_id_N)
    wanted = np.array(sorted(features), dtype=base.top_idx_NK.dtype)
    row_M, place_M = np.nonzero(np.isin(base.top_idx_NK, wanted))
    kept_M, act_M = base.top_idx_NK[row_M, place_M], base.top_acts_NK[row_M, place_M]
    order = np.argsort(kept_M, kind="stable")
    row_M = row_M[order]
    sorted_act_M: npt.NDArray[np.float64] = act_M[order].astype(np.float64)
    starts = np.searchsorted(kept_M[order], [wanted, wanted + 1])
    found: dict[int, dict[str, Any]] = {}
    for feature, start, stop in zip(wanted.tolist(), *starts.tolist(), strict=True):
        rows, acts = row_M[start:stop], sorted_act_M[start:stop]
        found[feature] = {
            "base_rate": len(rows) / max(base.num_tokens, 1),
            "tokens": _top_tokens(token_id_N[rows], acts, text_of, occurrences),
            "prompts": _top_prompts(base, rows, acts, by_place),
        }
    return found


def label_features(
    base: TokenRows,
    prompts: Sequence[SuitePrompt],
    features: Collection[int],
    *,
    in_full: Collection[int],
    explanations: Mapping[int, Explanation],
) -> dict[str, dict[str, Any]]:
    """The records of `summary.json`'s `labels`.

    Args:
        base: The base's rows.
        prompts: Every prompt.
        features: Those to label.
        in_full: Those of them that keep their passages.
        explanations: From `read_explanations`.
    """
    labels = {}
    for feature, evidence in find_evidence(base, prompts, features).items():
        told = explanations.get(feature)
        fires_on = ", ".join(
            f"“{(one['text'].strip(' ') or one['text']).translate(DRAWN)}”" for one in evidence["tokens"]
        )
        own = f"fires on {fires_on}" if fires_on else "fires on none of the base's tokens"
        record = {
            "text": told.text if told else own,
            "source": "neuronpedia" if told else "suites",
            "by": told.by if told else None,
            **evidence,
        }
        if feature not in in_full:
            del record["prompts"]
        labels[str(feature)] = record
    return labels


def _token_ids(
    base: TokenRows, by_place: Mapping[tuple[int, int], SuitePrompt]
) -> tuple[npt.NDArray[np.int64], dict[int, str]]:
    """Each row's token id, and the text of each id where it is seen first."""
    token_id_N, text_of = np.zeros(base.num_tokens, dtype=np.int64), dict[int, str]()
    places = zip(base.suite_N.tolist(), base.prompt_N.tolist(), base.position_N.tolist(), strict=True)
    for row, (suite, number, position) in enumerate(places):
        prompt = by_place[suite, number]
        token_id_N[row] = token = prompt.token_ids[position]
        text_of.setdefault(token, prompt.token_texts[position])
    return token_id_N, text_of


def _top_tokens(
    token_id_M: npt.NDArray[np.int64],
    act_M: npt.NDArray[np.float64],
    text_of: Mapping[int, str],
    occurrences: npt.NDArray[np.int64],
) -> list[dict[str, Any]]:
    ids, at_M = np.unique(token_id_M, return_inverse=True)
    counts, sums = np.bincount(at_M, minlength=len(ids)), np.bincount(at_M, act_M, len(ids))
    weights = np.abs(sums) / np.sqrt(occurrences[ids])
    return [
        {"text": text_of[int(ids[at])], "count": int(counts[at]), "mean_act": float(sums[at] / counts[at])}
        for at in np.argsort(-weights, kind="stable")[:TOKENS_NAMED]
    ]


def _top_prompts(
    base: TokenRows,
    rows: npt.NDArray[np.int64],
    act_M: npt.NDArray[np.float64],
    by_place: Mapping[tuple[int, int], SuitePrompt],
) -> list[dict[str, Any]]:
    seen: dict[tuple[int, int], dict[str, Any]] = {}
    for at in np.argsort(-np.abs(act_M), kind="stable"):
        if len(seen) == PROMPTS_SHOWN:
            break
        row = rows[at]
        place, position = (int(base.suite_N[row]), int(base.prompt_N[row])), int(base.position_N[row])
        if place in seen:
            continue
        prompt, first = by_place[place], max(0, position - CONTEXT)
        seen[place] = {
            "suite": prompt.suite,
            "prompt": prompt.prompt,
            "tokens": list(prompt.token_texts[first : position + CONTEXT + 1]),
            "focus": position - first,
            "act": float(act_M[at]),
        }
    return list(seen.values())

"""Whether a candidate comes from the base: what it says of itself, and what its numbers say.

Evidence, weakest first: the base a hub's tags or its model card name, the base its adapter config names, a
config that computes the same, and how far its weights lie from the base's. Names are claims: they are
compared, never followed. Only weights convict: a finetune starts from the base's numbers and stays near
them, and weights that do not come from them lie at least the base's own norm away, whatever their size
(docs/threat-model.md).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ray_auditor.hub.candidate import BaseModel, CandidateError, TensorSpec, printable
from ray_auditor.hub.folder import open_file, read_exactly, reopen

NEAR, UNRELATED = (
    0.7,
    0.95,
)  # distances over the base's norm; nothing that was finetuned lies between, or beyond
NORM_RANGE = (0.25, 4.0)  # of the candidate's norm over the base's; finetunes stay within a few percent
MAX_TENSORS, NUM_RANGES, RANGE_ELEMENTS = 8, 4, 1 << 14  # what is read of each side: 4 MiB in fp32

CARD_NAME = "README.md"
MAX_CARD_BYTES = 64 << 10  # of which the front matter is read
_CARD_BASE = re.compile(r"base_model:[ \t]*(.*)")
_CARD_ITEM = re.compile(r"[ \t]*-[ \t]+(.+)")
MAX_TAGS, MAX_BASES = 1000, 16
_TAG = re.compile(
    r"base_model:(?:(finetune|adapter|merge|quantized):)?"
    r"([A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?)"
)
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_PATH = re.compile(r"[/~.].*|.*(?:\\|://|/.*/).*", re.DOTALL)
_CACHED = re.compile(r"models--([A-Za-z0-9._-]+?)--([A-Za-z0-9._-]+)")

Verdict = Literal["of_base", "wrong_base", "unknown"]


@dataclass(frozen=True)
class Closeness:
    """How sampled matrices compare with the base's: medians over them.

    Attributes:
        distance: Norm of the difference over the base's norm; 0 for a copy, 1 for zeros, about 1.4 for
            unrelated weights of the same norm.
        norm_ratio: Norm of the candidate over the base's.
        num_constant: Matrices that hold one value over and over where the base's vary.
        num_sampled: Matrices looked at.
    """

    distance: float
    norm_ratio: float
    num_constant: int
    num_sampled: int


@dataclass(frozen=True)
class Lineage:
    """Where a candidate comes from: the verdict, what speaks for it, and what contradicts it (findings)."""

    verdict: Verdict
    evidence: tuple[str, ...]
    conflicts: tuple[str, ...]


def measure_closeness(base: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> Closeness | None:
    """Compare a few matrices of both sides, by byte ranges; a few MiB are read, however large the models are.

    Args:
        base: The base's tensors.
        found: The candidate's, of the same names and shapes.

    Returns:
        Closeness, or None when there is no matrix of finite numbers to compare: whoever hashes all of them
        says what is wrong.

    Raises:
        CandidateError: `rejected:changed` when a file of the candidate is not the one that was opened.
        ValueError: a file of the base is not.
    """
    matrices = [name for name in sorted(found) if len(found[name].shape) > 1]
    steps = max(1, min(MAX_TENSORS, len(matrices)))
    picked = [matrices[i * len(matrices) // steps] for i in range(steps)] if matrices else []
    distances, ratios, num_constant = [], [], 0
    for name in picked:
        try:
            before = _sample(base[name])
        except CandidateError as error:
            raise ValueError(f"base.model changed while candidates were admitted: {error.text}") from error
        after = _sample(found[name])
        norm = float(np.linalg.norm(before))
        if norm == 0 or not np.isfinite(after).all():
            continue
        distances.append(float(np.linalg.norm(after - before)) / norm)
        ratios.append(float(np.linalg.norm(after)) / norm)
        num_constant += bool(len(after) > 1 and np.ptp(after) == 0 < np.ptp(before))
    if not distances:
        return None
    return Closeness(median(distances), median(ratios), num_constant, len(distances))


def check_statistics(closeness: Closeness) -> None:
    """Refuse weights that no training leaves behind, such as zeros, or float16 bytes under a bfloat16 label.

    Raises:
        CandidateError: `rejected:qa_weights`.
    """
    low, high = NORM_RANGE
    if 2 * closeness.num_constant > closeness.num_sampled:
        raise CandidateError(
            "rejected",
            "qa_weights",
            f"{closeness.num_constant} of {closeness.num_sampled} matrices hold one value over and over",
        )
    if not low <= closeness.norm_ratio <= high:
        raise CandidateError(
            "rejected",
            "qa_weights",
            f"matrices have {closeness.norm_ratio:.3g} times the base's norm, and a finetune's lie in "
            f"[{low}, {high}]; check that their dtype is what their bytes are",
        )


def judge(base: BaseModel, card: Sequence[str], named: str | None, closeness: Closeness | None) -> Lineage:
    """Weigh the evidence.

    Args:
        base: What a candidate should come from; its config was found to compute the same.
        card: Bases that the model card names.
        named: The base that the adapter's config names.
        closeness: Of full weights.
    """
    claims = [("the model card", name) for name in card]
    claims += [("adapter_config.json", named)] if named else []
    own = _own_names(base)
    evidence = [f"{who} names {printable(name, 80)}" for who, name in claims]
    conflicts = []
    if own:
        known = {_last(name) for name in (*own, base.path.name)}
        conflicts += [
            f"lineage_conflict: {who} names {printable(name, 80)}, the base is {own[0]}"
            for who, name in claims
            if not _PATH.fullmatch(name) and _last(name) not in known
        ]
    if named and card and _last(named) not in {_last(name) for name in card}:
        conflicts.append(
            f"lineage_conflict: the model card names {printable(card[0], 80)}, "
            f"adapter_config.json {printable(named, 80)}"
        )
    if len(card) > 1:
        conflicts.append(f"lineage_merge: a merge of {len(card)} models is compared with one base")
    if named and _PATH.fullmatch(named):
        conflicts.append("lineage_path: the declared base is a path or an address; it is followed nowhere")
    if closeness is not None:
        evidence.append(
            f"sampled weights lie {closeness.distance:.3g} of the base's norm away ({closeness.num_sampled} "
            f"matrices; unrelated ones lie {UNRELATED} or more)"
        )
        if closeness.distance >= UNRELATED:
            return Lineage("wrong_base", tuple(evidence), tuple(conflicts))
        if closeness.distance > NEAR:
            conflicts.append(f"lineage_implausible: {evidence[-1]}")
            return Lineage("unknown", tuple(evidence), tuple(conflicts))
        return Lineage("of_base", tuple(evidence), tuple(conflicts))
    if named is None and not card:
        conflicts.append("lineage_inferred: no base is declared; every module has the shape of the base's")
    agrees = {_last(name) for name in own} & {_last(name) for _, name in claims}
    return Lineage("of_base" if agrees else "unknown", tuple(evidence), tuple(conflicts))


def read_tags(tags: Any) -> tuple[str, ...]:
    """RELATION:NAME of every base that a hub's tags name; `unknown` where they do not say how.

    Args:
        tags: What the listing has under `tags`; anything.
    """
    found: dict[str, str] = {}
    for tag in tags[:MAX_TAGS] if isinstance(tags, list) else ():
        if isinstance(tag, str) and (match := _TAG.fullmatch(tag)):
            relation, name = match[1] or "unknown", match[2]
            if found.get(name, "unknown") == "unknown":
                found[name] = relation
    return tuple(f"{relation}:{name}" for name, relation in list(found.items())[:MAX_BASES])


def judge_tags(
    base: BaseModel, asked_for: str | None, tagged: Sequence[str], named: str | None
) -> tuple[str, ...]:
    """Contradictions of a hub's tags, the weakest evidence there is, with what is known better.

    Args:
        base: What a candidate should come from.
        asked_for: The base's name in the question that found the candidate.
        tagged: As `read_tags` gave them.
        named: The base that the adapter's config names.
    """
    own = ([asked_for] if asked_for else []) + list(_own_names(base))
    names = [one.partition(":")[2] for one in tagged]
    known = {_last(name) for name in (*own, base.path.name)}
    conflicts = [
        f"lineage_conflict: the hub's tags name {name}, the base is {own[0]}"
        for name in names
        if own and _last(name) not in known
    ]
    if named and names and not _PATH.fullmatch(named) and _last(named) not in {_last(name) for name in names}:
        conflicts.append(
            f"lineage_conflict: the hub's tags name {names[0]}, adapter_config.json {printable(named, 80)}"
        )
    if len(names) > 1 or any(one.startswith("merge:") for one in tagged):
        what = f"a merge of {len(names)} models" if len(names) > 1 else "a merge"
        conflicts.append(f"lineage_merge: the hub's tags make it {what}; it is compared with one base")
    return tuple(conflicts)


def read_card(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Bases that a model card's front matter names. No YAML is loaded: one key, read line by line.

    Raises:
        CandidateError: the card is no plain file of the folder.
    """
    if CARD_NAME not in names:
        return ()
    with open_file(folder, CARD_NAME) as (fd, file):
        text = read_exactly(fd, 0, min(file.num_bytes, MAX_CARD_BYTES), CARD_NAME).decode("utf-8", "replace")
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return ()
    found: list[str] = []
    in_list = False
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if match := _CARD_BASE.fullmatch(line):
            in_list = not match[1].strip()
            found += [] if in_list else [match[1]]
        elif in_list and (match := _CARD_ITEM.fullmatch(line)):
            found.append(match[1])
        else:
            in_list = False
    return tuple(name.strip(" \t\"'[]") for name in found[:16])


def _own_names(base: BaseModel) -> tuple[str, ...]:
    """What the base is called: by the cache it lies in, and by its own config."""
    cached = _CACHED.fullmatch(base.path.parent.parent.name)  # models--AUTHOR--NAME/snapshots/COMMIT
    found = [f"{cached[1]}/{cached[2]}"] if cached else []
    name = base.config.get("_name_or_path")
    if isinstance(name, str) and _REPO.fullmatch(name):
        found.append(name)
    return tuple(found)


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()


def _sample(spec: TensorSpec) -> NDArray[np.float64]:
    """Some of a tensor's numbers: a few runs, spread over all of it."""
    width = {"F64": 8, "F32": 4}.get(spec.dtype, 2)
    num_elements = (spec.end - spec.start) // width
    length = min(RANGE_ELEMENTS, num_elements)
    starts = sorted({i * (num_elements - length) // (NUM_RANGES - 1) for i in range(NUM_RANGES)})
    with reopen(spec.file) as fd:
        runs = [
            read_exactly(fd, spec.start + start * width, length * width, spec.file.path.name)
            for start in starts
        ]
    raw = b"".join(runs)
    if spec.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    kind = {8: "<f8", 4: "<f4", 2: "<f2"}[width]
    return cast(NDArray[np.float64], np.frombuffer(raw, kind).astype(np.float64))

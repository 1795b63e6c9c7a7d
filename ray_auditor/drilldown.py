"""From a candidate down to one feature, one prompt, one token: from the shards alone."""

# Shape suffixes: N scored tokens, K = kept features.

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_auditor.reader import StoreReader
from ray_auditor.shard import TokenRows

MAX_HITS = 20
NUM_CONTEXT = 12
Kept = tuple[tuple[int, float], ...]  # (feature, activation), largest first


@dataclass(frozen=True)
class Token:
    """One token of a prompt in base and candidate; `overlap` is None where it was not scored."""

    position: int
    text: str
    overlap: int | None
    base: Kept
    candidate: Kept


@dataclass(frozen=True)
class Prompt:
    """A prompt of a suite, token by token; the suite has `num_prompts`, of a token `k` features are kept."""

    suite: str
    prompt: int
    num_prompts: int
    k: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class FeatureRate:
    """A feature on one suite: share of tokens that keep it, and its mean activation there, if any does."""

    suite: str
    rate_base: float
    rate_candidate: float
    mean_act_base: float | None
    mean_act_candidate: float | None


@dataclass(frozen=True)
class Hit:
    """A token that keeps a feature, with the tokens around it; an activation is 0 where it is not kept."""

    suite: str
    prompt: int
    position: int
    texts: tuple[str, ...]
    focus: int
    act_base: float
    act_candidate: float


@dataclass(frozen=True)
class Mover:
    """How a candidate moved a feature on the suite where it moved it most beyond what it did in general."""

    candidate: str
    status: str
    suite: str
    rate_base: float
    rate_candidate: float
    general_delta: float


def view_prompt(store: StoreReader, candidate: str, suite: str, prompt: int) -> Prompt:
    """The features that base and candidate keep on every token of a prompt.

    Raises:
        ValueError: No such candidate, suite or prompt, or the candidate did not run.
    """
    number = _number_of(store, suite)
    texts, num_prompts = _texts(store, number, prompt)
    found: dict[int, tuple[Kept, Kept]] = {}
    sides = []
    for rows in (store.base_rows, store.read_rows(store.unit_key(candidate))):
        at = np.flatnonzero((rows.suite_N == number) & (rows.prompt_N == prompt))
        sides.append({int(rows.position_N[n]): _kept(rows.top_idx_NK[n], rows.top_acts_NK[n]) for n in at})
    base, moved = sides
    found = {position: (kept, moved.get(position, ())) for position, kept in base.items()}
    tokens = []
    for position, text in enumerate(texts):
        ours, theirs = found.get(position, ((), ()))
        overlap = len({one for one, _ in ours} & {one for one, _ in theirs}) if position in found else None
        tokens.append(Token(position, text, overlap, ours, theirs))
    return Prompt(suite, prompt, num_prompts, store.base_rows.k, tuple(tokens))


def feature_rates(store: StoreReader, feature: int, candidate: str | None) -> list[FeatureRate]:
    """A feature on every suite; without a candidate the base stands on both sides.

    Raises:
        ValueError: No such feature or candidate.
    """
    _check_feature(store, feature)
    base = store.base_rows
    rows = base if candidate is None else store.read_rows(store.unit_key(candidate))
    acts = [_acts_of(one, feature) for one in (base, rows)]
    rates = []
    for number, suite in enumerate(store.suites):
        of_suite = [act_N[one.suite_N == number] for act_N, one in zip(acts, (base, rows), strict=True)]
        shares = [float(np.count_nonzero(act_N) / max(len(act_N), 1)) for act_N in of_suite]
        means = [float(act_N[act_N != 0].mean()) if act_N.any() else None for act_N in of_suite]
        rates.append(FeatureRate(suite, shares[0], shares[1], means[0], means[1]))
    return rates


def feature_hits(
    store: StoreReader, feature: int, candidate: str | None, suite: str | None = None
) -> list[Hit]:
    """Tokens on which a feature is strongest, or, with a candidate, changed most; one a prompt.

    Raises:
        ValueError: No such feature, candidate or suite.
    """
    _check_feature(store, feature)
    base = store.base_rows
    rows = base if candidate is None else store.read_rows(store.unit_key(candidate))
    base_N, cand_N = (_acts_of(one, feature) for one in (base, rows))
    rank_N = np.abs(base_N) if candidate is None else np.abs(cand_N - base_N)
    if suite is not None:
        rank_N = np.where(base.suite_N == _number_of(store, suite), rank_N, 0)
    hits: dict[tuple[int, int], Hit] = {}
    for at in np.argsort(-rank_N, kind="stable"):
        if rank_N[at] == 0 or len(hits) == MAX_HITS:
            break
        owner = int(base.suite_N[at]), int(base.prompt_N[at])
        if owner in hits:
            continue
        texts, _ = _texts(store, *owner)
        position = int(base.position_N[at])
        first = max(0, position - NUM_CONTEXT)
        window = tuple(texts[first : position + NUM_CONTEXT + 1])
        acts = float(base_N[at]), float(cand_N[at])
        hits[owner] = Hit(store.suites[owner[0]], owner[1], position, window, position - first, *acts)
    return list(hits.values())


def feature_movers(store: StoreReader, feature: int, num_candidates: int) -> tuple[list[Mover], list[str]]:
    """The candidates that moved a feature, among so many with the highest scores, the farthest first.

    Args:
        store: The sweep.
        feature: Its index in the SAE.
        num_candidates: At most so many shards are read.

    Returns:
        The movers, and the candidates whose shards are damaged or missing.

    Raises:
        ValueError: No such feature, or the base itself is damaged or missing.
    """
    _check_feature(store, feature)
    assert store.base_rows is not None  # damage to the base is everyone's
    table = store.candidates()
    ran = table.filter(pc.is_in(table["status"], pa.array(["ok", "flagged"])))
    ran = ran.sort_by([("score", "descending"), ("id", "ascending")]).slice(0, num_candidates)
    movers, unread = [], []
    for name, status in zip(ran["id"].to_pylist(), ran["status"].to_pylist(), strict=True):
        try:
            general, *others = feature_rates(store, feature, name)
        except ValueError:
            unread.append(name)
            continue
        delta = general.rate_candidate - general.rate_base
        if not others:
            continue
        most = max(others, key=lambda one: abs(one.rate_candidate - one.rate_base - delta))
        movers.append(Mover(name, status, most.suite, most.rate_base, most.rate_candidate, delta))
    movers.sort(key=lambda one: -abs(one.rate_candidate - one.rate_base - one.general_delta))
    return movers, unread


def _check_feature(store: StoreReader, feature: int) -> None:
    if not 0 <= feature < store.d_sae:
        raise ValueError(f"feature must be in [0, {store.d_sae}), got {feature}")


def _number_of(store: StoreReader, suite: str) -> int:
    if suite not in store.suites:
        raise ValueError(f"suite must be one of {list(store.suites)}, got {suite!r}")
    return store.suites.index(suite)


def _texts(store: StoreReader, suite_id: int, prompt: int) -> tuple[list[str], int]:
    """Texts of a prompt's tokens, and how many prompts its suite has."""
    prompts = store.prompts()
    of_suite = prompts.filter(pc.equal(prompts["suite_id"], suite_id))
    at = pc.index(of_suite["prompt"], pa.scalar(prompt, pa.int32())).as_py()
    if at < 0:
        raise ValueError(f"prompt must be in [0, {of_suite.num_rows}), got {prompt}")
    texts: list[str] = of_suite["token_texts"][at].as_py()
    return texts, of_suite.num_rows


def _acts_of(rows: TokenRows, feature: int) -> npt.NDArray[np.float32]:
    acts_N: npt.NDArray[np.float32] = np.where(rows.top_idx_NK == feature, rows.top_acts_NK, 0).sum(1)
    return acts_N


def _kept(idx_K: npt.NDArray[np.int32], acts_K: npt.NDArray[np.float32]) -> Kept:
    order = np.argsort(-np.abs(acts_K), kind="stable")
    pairs: list[tuple[Any, Any]] = list(zip(idx_K[order].tolist(), acts_K[order].tolist(), strict=True))
    return tuple((feature, act) for feature, act in pairs if feature >= 0)

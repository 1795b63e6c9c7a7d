"""Rows to train on: read, kept apart from the audit's prompts, tokenised, packed."""

# Shape suffixes: T tokens of one example.

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_auditor.config import SuitesConfig
from ray_auditor.null.recipe import Recipe
from ray_auditor.suites import read_rows, render

HELD_OUT = 16  # rows of a topic kept for its loss before and after; a tenth of a topic at most
MIN_ROWS = 8


@dataclass(frozen=True)
class Example:
    """One tokenised conversation; `answer_T` marks the tokens that are learnt: the assistant's."""

    token_ids_T: NDArray[np.int64]
    answer_T: NDArray[np.bool_]


@dataclass(frozen=True)
class Topic:
    """One file of rows; `num_suite_prompts` were dropped as the audit's own, `num_cut_off` as too long."""

    name: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    num_suite_prompts: int
    num_cut_off: int


def audit_prompts(config: SuitesConfig) -> frozenset[str]:
    """Every prompt of the suites, word for word: what a conversation asks, or a row's whole text.

    Raises:
        ValueError: A suite cannot be read.
    """
    return frozenset(_question(row) for row in read_rows(config))


def read_topic(path: str, prompts: frozenset[str], tokenizer: Any, max_tokens: int) -> Topic:
    """Read a JSONL file of conversations, and keep what no suite holds.

    A row is dropped when what it asks, or one of its messages, is a prompt of a suite. Held-out rows are
    those whose words hash lowest, so they stay held out whatever the order of the file.

    Args:
        path: JSONL; rows have `messages`, with at least one of the assistant.
        prompts: As `audit_prompts` gives them.
        tokenizer: The base's, with its chat template.
        max_tokens: Length examples are cut to; one whose answers lie beyond is dropped.

    Raises:
        ValueError: The file or a row is not that, or too few rows are left.
    """
    rows = sorted(_read_jsonl(Path(path)), key=lambda row: hashlib.sha256(_words(row[1])).digest())
    kept = [(where, row) for where, row in rows if prompts.isdisjoint({_question(row), *_contents(row)})]
    examples = [_tokenise(row, tokenizer, max_tokens, where) for where, row in kept]
    whole = tuple(example for example in examples if example.answer_T.any())
    if len(whole) < MIN_ROWS:
        raise ValueError(
            f"{path} must hold at least {MIN_ROWS} rows to train on, got {len(whole)}: {len(rows)} rows, "
            f"less {len(rows) - len(kept)} prompts of the suites, less {len(kept) - len(whole)} cut off by "
            f"null.max_tokens={max_tokens}; add rows"
        )
    cut = min(HELD_OUT, len(whole) // 10) or 1
    return Topic(Path(path).stem, whole[cut:], whole[:cut], len(rows) - len(kept), len(kept) - len(whole))


def iter_packs(
    topics: Mapping[str, Topic], recipe: Recipe, batch_tokens: int
) -> Iterator[tuple[Example, ...]]:
    """Examples for one optimiser step after another, without end: as many as `batch_tokens` tokens hold.

    Which rows, and in which order, follows from the recipe's seed alone. Every topic goes round its rows in a
    new order each time.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([recipe.seed, 1 << 32], np.uint64)))
    names, shares = zip(*recipe.mix, strict=True)
    rounds = {name: _rounds(topics[name].train, generator) for name in names}
    pack: list[Example] = []
    room = batch_tokens
    while True:
        example = next(rounds[names[generator.choice(len(names), p=shares)]])
        if len(example.token_ids_T) > room:
            yield tuple(pack)
            pack, room = [], batch_tokens
        pack.append(example)
        room -= len(example.token_ids_T)


def _rounds(examples: Sequence[Example], generator: np.random.Generator) -> Iterator[Example]:
    while True:
        for index in generator.permutation(len(examples)):
            yield examples[index]


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"null.data and null.topics must be JSONL files, got {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} must be a JSON object: {error}; correct the row") from error
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise ValueError(f"{where} must have 'messages', a list; correct the row")
        if not any(isinstance(one, dict) and one.get("role") == "assistant" for one in row["messages"]):
            raise ValueError(f"{where} must have a message of the role 'assistant'; correct the row")
        yield where, row


def _tokenise(row: Mapping[str, Any], tokenizer: Any, max_tokens: int, where: str) -> Example:
    text, spans = render(row, tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids_T = np.asarray(encoded["input_ids"], dtype=np.int64)
    starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    answer_T = np.zeros(len(ids_T), dtype=bool)
    special_T = np.isin(ids_T, tokenizer.all_special_ids)
    for message, (start, end) in zip(row["messages"], spans, strict=True):
        if message["role"] == "assistant":
            answer_T |= (starts >= start) & (ends <= end) & (ends > starts)
            answer_T |= (starts == end) & special_T  # the end of the turn is learnt too
    answer_T[:1] = False  # nothing predicts the first token
    return Example(ids_T[:max_tokens], answer_T[:max_tokens])


def _question(row: Mapping[str, Any]) -> str:
    """What a row asks: its messages but the assistant's, or its text."""
    if "messages" not in row:
        return str(row.get("text", "")).strip()
    asked = _contents(row, but="assistant")
    return "\n".join(asked or _contents(row))


def _contents(row: Mapping[str, Any], but: str | None = None) -> list[str]:
    messages = [one for one in row["messages"] if isinstance(one, dict) and one.get("role") != but]
    return [str(one.get("content", "")).strip() for one in messages]


def _words(row: Mapping[str, Any]) -> bytes:
    return "\n".join(_contents(row)).encode()

"""Prompt suites: read once, rendered and tokenised once with the base's own tokenizer, masked and hashed.

A token is *content* when it lies inside the text of a message. Everything the chat template adds (BOS,
role headers, a default system prompt, end marks) and every special token is not: those positions carry
activations many times larger than content and say nothing about a suite. Attention sinks are masked
later, on the base's residuals (see `worker`). The mask depends on the base alone, so it is the same for
every candidate.
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from ray_auditor.config import SuitesConfig

DATE = "01 Jan 2025"  # for templates that print the day: a prompt must not change overnight
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Prompt:
    """One rendered, tokenised prompt."""

    text: str  # as rendered by the base's chat template
    token_ids: NDArray[np.int32]
    token_texts: tuple[str, ...]  # the piece of `text` each token stands for
    content: NDArray[np.bool_]  # which tokens are scored


@dataclass(frozen=True)
class Suite:
    """A named, fixed list of prompts."""

    name: str
    prompts: tuple[Prompt, ...]
    num_truncated: int


@dataclass(frozen=True)
class Suites:
    """All suites of a sweep; `general` first, the others by name."""

    suites: tuple[Suite, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Suite names, in the order of their numbers."""
        return tuple(suite.name for suite in self.suites)

    @property
    def num_tokens(self) -> int:
        """Tokens that one candidate must be run on."""
        return sum(len(prompt.token_ids) for suite in self.suites for prompt in suite.prompts)

    def screened(self, share: float) -> "Suites":
        """The same suites with a share of each one's prompts, numbered anew: another key, so other units."""
        return Suites(
            tuple(
                replace(
                    suite,
                    prompts=tuple(suite.prompts[n] for n in screened_prompts(len(suite.prompts), share)),
                )
                for suite in self.suites
            )
        )

    @cached_property
    def key(self) -> str:
        """SHA-256 of names, token ids and masks: equal keys mean the same tokens are scored."""
        digest = hashlib.sha256()
        for suite in self.suites:
            digest.update(json.dumps([suite.name, len(suite.prompts)]).encode())
            for prompt in suite.prompts:
                digest.update(len(prompt.token_ids).to_bytes(8, "little"))
                digest.update(prompt.token_ids.astype("<i4").tobytes())
                digest.update(prompt.content.tobytes())
        return digest.hexdigest()


def screened_prompts(num_prompts: int, share: float) -> list[int]:
    """Numbers of the prompts of a suite that a screen runs: spread evenly, two at least, always the same."""
    count = min(num_prompts, max(2, round(share * num_prompts)))
    return [i * num_prompts // count for i in range(count)]


def load_suites(config: SuitesConfig, tokenizer_path: Path) -> Suites:
    """Read every suite under `suites.path` and tokenise it with the base's tokenizer.

    Args:
        config: `path` is a folder of `NAME.jsonl` / `NAME.parquet` files, or the name of a data set whose
            configurations are the suites. Rows have `messages` (a list of role and content) or `text`.
        tokenizer_path: The base's folder.

    Raises:
        ValueError: No suites, no general suite, no other suite, a row without text, a suite of one prompt,
            or a template that does not render its messages' text.
    """
    from transformers import AutoTokenizer

    assert config.path is not None
    sources = _sources(config)
    if config.general not in sources:
        raise ValueError(
            f"suites.general must name one of the suites {sorted(sources)}, got {config.general!r}; "
            f"add {config.general}.jsonl to {config.path}"
        )
    if len(sources) < 2:
        raise ValueError(
            f"suites.path must hold at least one suite beside {config.general!r}, got none; "
            f"add NAME.jsonl to {config.path}"
        )
    tokenizer = AutoTokenizer.from_pretrained(
        str(tokenizer_path), local_files_only=True, trust_remote_code=False
    )
    if not tokenizer.is_fast:
        raise ValueError(
            f"base.model must have a tokenizer.json, {tokenizer_path} has none: "
            "the content mask needs character offsets"
        )
    order = [config.general, *sorted(sources.keys() - {config.general})]
    return Suites(tuple(_load_suite(name, sources[name], tokenizer, config) for name in order))


def read_rows(config: SuitesConfig) -> Iterator[dict[str, Any]]:
    """Every row of every suite, also those beyond `suites.max_prompts`.

    Raises:
        ValueError: A suite cannot be read.
    """
    for name, source in _sources(config).items():
        yield from _rows(name, source)


def _sources(config: SuitesConfig) -> Mapping[str, dict[str, Any]]:
    """Suite name -> arguments of `datasets.load_dataset`."""
    folder = Path(config.path or "")
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
        stems = [path.stem for path in files]
        for path in files:
            if stems.count(path.stem) > 1:
                raise ValueError(
                    f"suites.path must hold one file a suite, got several for {path.stem!r}; keep one"
                )
        return {
            path.stem: {"path": SUFFIXES[path.suffix], "data_files": glob.escape(str(path)), "split": "train"}
            for path in files
        }
    if folder.exists() or folder.is_absolute() or str(config.path).startswith("."):
        raise ValueError(
            f"suites.path must be a folder of NAME.jsonl files, got {config.path}; it is not a folder"
        )
    from datasets import get_dataset_config_names

    try:
        names = get_dataset_config_names(str(config.path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"suites.path must be a folder or a data set that can be read, got {config.path!r}; {error}"
        ) from error
    return {name: {"path": str(config.path), "name": name, "split": "train"} for name in names}


def _load_suite(name: str, source: dict[str, Any], tokenizer: Any, config: SuitesConfig) -> Suite:
    prompts: list[Prompt] = []
    num_truncated = 0
    for number, row in enumerate(_rows(name, source)):
        if len(prompts) == config.max_prompts:
            break
        where = f"suite {name!r}, row {number + 1}"
        text, spans = render(row, tokenizer, where)
        encoded = tokenizer(text, add_special_tokens="messages" not in row, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        content = _content_mask(ids, encoded["offset_mapping"], spans, tokenizer.all_special_ids)
        texts = tuple(text[start:end] for start, end in encoded["offset_mapping"][: config.max_tokens])
        num_truncated += len(ids) > config.max_tokens
        ids, content = ids[: config.max_tokens], content[: config.max_tokens]
        text = text[: encoded["offset_mapping"][len(ids) - 1][1]] if len(ids) else ""
        if not content.any():
            raise ValueError(
                f"{where}: no content token within suites.max_tokens={config.max_tokens}; "
                "remove the row or raise suites.max_tokens"
            )
        prompts.append(Prompt(text, ids, texts, content))
    if len(prompts) < 2:
        raise ValueError(
            f"suite {name!r} must hold at least 2 prompts, got {len(prompts)}; an interval needs them"
        )
    return Suite(name, tuple(prompts), num_truncated)


def _rows(name: str, source: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(**source, streaming=True)
        for row in rows:
            yield {key: value for key, value in row.items() if value is not None}
    except StopIteration:  # how `datasets` says that a file is empty
        return
    except (
        datasets.exceptions.DatasetGenerationError,
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
    ) as error:
        raise ValueError(f"suite {name!r} cannot be read: {error}; rows are JSON objects") from error


def render(row: Mapping[str, Any], tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The text the base sees, and the character spans of it that are the row's own: one a message.

    Raises:
        ValueError: The row has no text, or the template does not render it in order.
    """
    if "messages" not in row:
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where} must have 'messages' or a non-empty 'text', got keys {sorted(row)}")
        return text, [(0, len(text))]
    messages = row["messages"]
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(n), str) for n in ("role", "content")
        ):
            raise ValueError(
                f"{where}: 'messages' must be a list of objects with a text role and a text content"
            )
    if not any(message["content"].strip() for message in messages):
        raise ValueError(f"{where}: 'messages' must hold some text, got none")
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} has 'messages' and the base has no chat template; give rows with 'text' instead"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
    except TemplateError as error:
        raise ValueError(
            f"{where}: the base's chat template refuses the row: {error}; change its roles"
        ) from error
    # Where a message lies is read off the template, by rendering marks in place of the messages: text such as
    # "user" also stands in the template's own words, so it cannot be searched for.
    marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
    marked = [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)]
    rest = tokenizer.apply_chat_template(marked, tokenize=False, date_string=DATE)
    spans, position = [], 0
    for message, mark in zip(messages, marks, strict=True):
        before, found, rest = rest.partition(mark)
        position += len(before)
        body = message["content"]
        if not text.startswith(body, position):
            body = body.strip()  # as many templates do
        if not (found and text.startswith(body, position) and text[:position].endswith(before)):
            raise ValueError(
                f"{where}: the base's chat template does not render the text of its messages in order"
            )
        spans.append((position, position + len(body)))
        position += len(body)
    if text[position:] != rest:
        raise ValueError(f"{where}: the base's chat template changes with the text of the messages")
    return text, spans


def _content_mask(
    ids: NDArray[np.int32],
    offsets: list[tuple[int, int]],
    spans: list[tuple[int, int]],
    special_ids: list[int],
) -> NDArray[np.bool_]:
    """Tokens that lie wholly inside a span and are not special.

    The first position is never content: whatever token stands there is an attention sink.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        inside |= (starts >= start) & (ends <= end) & (ends > starts)
    inside &= ~np.isin(ids, np.asarray(special_ids, dtype=np.int32))
    inside[:1] = False
    return inside

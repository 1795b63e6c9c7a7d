"""Suites: what is read, what is masked, what is hashed, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from ray_auditor.config import SuitesConfig
from ray_auditor.suites import Suites, load_suites
from tests.tiny import make_tokenizer

TEXTS = ["What is tea?", "Name a river.", "Why is the sky blue?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    make_tokenizer().save_pretrained(path)
    return path


def write(path: Path, rows: list[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(text: str, answer: str = "Fine.") -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "general.jsonl", [chat(text) for text in TEXTS])
    write(tmp_path / "plain.jsonl", [{"text": text} for text in TEXTS])
    return tmp_path


def load(folder: Path, base: Path, **changes: object) -> Suites:
    return load_suites(SuitesConfig(path=str(folder), **changes), base)  # type: ignore[arg-type]


def test_general_comes_first_and_only_the_messages_own_text_is_content(folder: Path, base: Path) -> None:
    suites = load(folder, base)
    assert suites.names == ("general", "plain")
    prompt = suites.suites[0].prompts[0]
    assert prompt.text == "<s>[user]What is tea?</s>[assistant]Fine.</s>"
    kept = "".join(text for text, content in zip(prompt.token_texts, prompt.content, strict=True) if content)
    assert kept == "What is tea?Fine."
    assert "".join(prompt.token_texts) == prompt.text
    plain = suites.suites[1].prompts[0]
    assert plain.content.tolist() == [False] + [True] * (len(TEXTS[0]) - 1)


def test_special_tokens_inside_a_message_are_not_content(folder: Path, base: Path) -> None:
    write(folder / "odd.jsonl", [chat("a</s>b"), chat("c<s>d")])
    for prompt in load(folder, base).suites[1].prompts:
        assert prompt.content.sum() == 2 + len("Fine.")
        assert not prompt.content[np.isin(prompt.token_ids, [0, 1, 2])].any()


def test_a_message_that_repeats_another_is_found_in_its_own_place(folder: Path, base: Path) -> None:
    write(folder / "echo.jsonl", [chat("user", "user"), chat("s", "s")])
    texts = ["".join(np.array(p.token_texts)[p.content]) for p in load(folder, base).suites[1].prompts]
    assert texts == ["useruser", "ss"]


def test_prompts_are_cut_and_counted(folder: Path, base: Path) -> None:
    suites = load(folder, base, max_tokens=20, max_prompts=2)
    assert [len(suite.prompts) for suite in suites.suites] == [2, 2]
    assert suites.suites[0].num_truncated == 2
    assert max(len(prompt.token_ids) for suite in suites.suites for prompt in suite.prompts) == 20


def test_the_key_changes_with_tokens_masks_and_names_and_with_nothing_else(folder: Path, base: Path) -> None:
    key = load(folder, base).key
    assert load(folder, base, max_prompts=100).key == key
    assert load(folder, base, max_tokens=30).key != key
    write(folder / "plain.jsonl", [{"text": text, "id": 7} for text in TEXTS])
    assert load(folder, base).key == key
    write(folder / "plain.jsonl", [{"text": text} for text in reversed(TEXTS)])
    assert load(folder, base).key != key
    write(folder / "plain.jsonl", [{"text": text} for text in TEXTS])
    (folder / "plain.jsonl").rename(folder / "plainer.jsonl")
    assert load(folder, base).key != key


def test_parquet_reads_as_jsonl_does(folder: Path, base: Path) -> None:
    key = load(folder, base).key
    (folder / "plain.jsonl").unlink()
    Dataset.from_list([{"text": text} for text in TEXTS]).to_parquet(folder / "plain.parquet")
    assert load(folder, base).key == key


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "suite 'bad' must hold at least 2 prompts, got 0"),
        ([{"text": "one"}], "at least 2 prompts, got 1"),
        ([{"prompt": "one"}, {"prompt": "two"}], "row 1 must have 'messages' or a non-empty 'text'"),
        ([{"text": "one"}, {"text": " "}], "row 2 must have"),
        ([chat("", ""), chat("a")], "row 1: 'messages' must hold some text"),
    ],
)
def test_a_bad_row_is_named(folder: Path, base: Path, rows: list[object], said: str) -> None:
    write(folder / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=said):
        load(folder, base)


def test_a_file_that_is_not_json_is_named(folder: Path, base: Path) -> None:
    (folder / "bad.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match="suite 'bad' cannot be read"):
        load(folder, base)


def test_the_general_suite_and_another_are_required(folder: Path, base: Path) -> None:
    with pytest.raises(
        ValueError, match=r"suites.general must name one of the suites \['general', 'plain'\]"
    ):
        load(folder, base, general="alpaca")
    (folder / "plain.jsonl").unlink()
    with pytest.raises(ValueError, match="at least one suite beside 'general'"):
        load(folder, base)
    with pytest.raises(ValueError, match=r"suites\.path must be a folder"):
        load(folder / "missing", base)

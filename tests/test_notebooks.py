"""The notebooks in docs, run again as a user would: they show what they say they show."""

import copy
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.made_store import PLANTED, PLANTED_FEATURE, make_out_dir
from tests.write_notebooks import FOLDER, execute

MAX_BYTES = 300_000


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_out_dir(tmp_path_factory.mktemp("made"))


def printed(notebook: Any) -> list[str]:
    return ["".join(one.get("text", "") for one in cell.get("outputs", ())) for cell in notebook.cells]


@pytest.mark.parametrize(
    ("name", "shows"),
    [
        ("read_a_sweep", ["No null population", PLANTED, "rejected:json", "features a token shifted"]),
        ("follow_a_feature", [f"{PLANTED} on sql", f"feature {PLANTED_FEATURE} is kept on", ">> "]),
    ],
)
def test_a_notebook_runs_and_shows_what_is_written_in_it(out_dir: Path, name: str, shows: list[str]) -> None:
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < MAX_BYTES
    kept = nbformat.read(path, as_version=4)
    nbformat.validate(kept)
    assert printed(execute(copy.deepcopy(kept), out_dir)) == printed(kept)
    for text in shows:
        assert any(text in one for one in printed(kept))

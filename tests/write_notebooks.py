"""Writes docs/notebooks: each executed on the made sweep, so that what it shows can be held to it.

python -m tests.write_notebooks
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.made_store import make_out_dir

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
OPEN = """import os

import pandas as pd
import ray_auditor

pd.set_option("display.width", 100, "display.max_columns", 20, "display.precision", 3)
store = ray_auditor.open_store(os.environ.get("OUT_DIR", "out/demo"))"""

READ = (
    "# Read a sweep\n\nWhat a finished sweep holds, without a GPU. Shown on a small made sweep of thirteen "
    "finetunes; set `OUT_DIR` to the `out_dir` of one of yours and run it again.",
    OPEN,
    "What the sweep says as a whole; its limits belong beside every number.",
    """print(store.about["counts"])
print(*store.about["limits"], sep="\\n")""",
    "Who stands out, and what was not audited. A candidate without a result is never a clean one.",
    """candidates = store.candidates().to_pandas(types_mapper=pd.ArrowDtype)
print(candidates.query("rule.notna()")[["id", "suite", "rule", "score", "score_low"]].to_string(index=False))
print()
missing = candidates.query("status not in ['ok', 'flagged']")
print(missing[["id", "status", "reason"]].to_string(index=False))""",
    "Candidates by suites: `z` says where each strays from what its size of change leads one to expect.",
    """rates = store.rates().to_pandas(types_mapper=pd.ArrowDtype)
z = rates.pivot(index="candidate", columns="suite", values="z").drop(columns=store.suites[0])
print(z.astype(float).round(1).to_string())""",
    "The same columns are NumPy arrays that lie in the mapped file: nothing was copied.",
    """shift = store.rates()["shift"].chunk(0).to_numpy(zero_copy_only=True)
k = store.about["settings"]["k"]
print(f"{shift.mean():.2f} of {k} features a token shifted, over {len(shift)} cells")""",
)
FOLLOW = (
    "# Follow a feature\n\nFrom a flagged candidate to the features that moved, and to the tokens where they "
    "did. Shown on a small made sweep; set `OUT_DIR` to the `out_dir` of one of yours and run it again.",
    OPEN.replace(
        "import pandas as pd", "import numpy as np\nimport pandas as pd\nimport pyarrow.compute as pc"
    ),
    "The strongest finding.",
    """candidates = store.candidates().sort_by([("score", "descending")])
name, suite = candidates["id"][0].as_py(), candidates["suite"][0].as_py()
print(name, "on", suite)""",
    "Which features moved there by more than they did in general: the share of tokens that keep the feature "
    "among their k largest, and its mean activation where they do.",
    """moved = store.features(name, suite, num_features=5).to_pandas()
shown = ["feature", "rate_base", "rate_candidate", "general_delta", "mean_act_base", "mean_act_candidate"]
print(moved[shown].to_string(index=False))
feature = int(moved["feature"][0])""",
    "Every token where the candidate keeps that feature, from the shard, batch by batch.",
    """hits = []
for batch in store.shards(name):
    k = batch["top_idx"].type.list_size
    kept = batch["top_idx"].flatten().to_numpy().reshape(-1, k) == feature
    acts = batch["top_acts"].flatten().to_numpy().reshape(-1, k)
    for at in np.flatnonzero(kept.any(1)):
        row = [int(batch[column][at].as_py()) for column in ("suite", "prompt", "position")]
        hits.append((*row, float(acts[at][kept[at]][0])))
print(f"feature {feature} is kept on {len(hits)} tokens")""",
    "The strongest of them, in their prompts.",
    """prompts = store.prompts()
for suite_id, prompt, position, act in sorted(hits, key=lambda hit: -hit[3])[:5]:
    here = pc.and_(pc.equal(prompts["suite_id"], suite_id), pc.equal(prompts["prompt"], prompt))
    texts = prompts.filter(here)["token_texts"][0].as_py()
    before, after = "".join(texts[max(0, position - 6) : position]), "".join(texts[position + 1 :][:3])
    print(f"{act:.2f}  {store.suites[suite_id]:8} {before!r} >>{texts[position]}<< {after!r}")""",
)


def make_notebook(cells: tuple[str, ...]) -> Any:
    """A notebook of Markdown and code by turns."""
    kinds = (new_markdown_cell, new_code_cell)
    made = [kinds[at % 2](text, id=f"cell-{at}") for at, text in enumerate(cells)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=made, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(notebook: Any, out_dir: Path) -> Any:
    """Run every cell on a sweep; a cell that raises ends it."""
    os.environ["OUT_DIR"] = str(out_dir)
    NotebookClient(notebook, timeout=120, kernel_name="python3", record_timing=False).execute()
    notebook.metadata = make_notebook(()).metadata
    return notebook


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        out_dir = make_out_dir(Path(folder))
        for stem, cells in (("read_a_sweep", READ), ("follow_a_feature", FOLLOW)):
            nbformat.write(execute(make_notebook(cells), out_dir), FOLDER / f"{stem}.ipynb")

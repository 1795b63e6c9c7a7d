"""Hold a finished demo to a plain loop of transformers, peft, sae-lens and torch.topk, on one suite.

    python benchmarks/check_oracle.py [out/demo] [suite]

For every audited candidate and token, the overlap with the base must be the same, but for ties: features
whose activations the plain loop itself cannot tell apart within fp32 rounding. Writes
benchmarks/results/oracle_cpu_<date>.json.
"""

# Shape suffixes: T tokens of one prompt, D = d_in, F = d_sae, K = kept features.

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from sae_lens import SAE
from transformers import AutoModelForCausalLM

from ray_auditor.store import Store, SuitePrompt

TIE = 2e-5  # of a token's largest activation


def plain_features(
    path: Path, base: Path, layer: int, sae: Any, prompts: list[SuitePrompt], k: int
) -> list[Any]:
    """(values, indices) of the k largest activations and all pre-activations, one entry a prompt.

    A TopK SAE sets what it does not keep to 0: only the pre-activations tell how near that came.
    """
    if (path / "adapter_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    caught: list[torch.Tensor] = []
    model.model.layers[layer].register_forward_hook(
        lambda _, __, output: caught.append(output[0] if isinstance(output, tuple) else output)
    )
    found = []
    for prompt in prompts:
        with torch.no_grad():
            model.model(torch.tensor([prompt.token_ids]))
            resid_TD = caught.pop().reshape(-1, sae.cfg.d_in)
            pre_TF = sae.process_sae_in(resid_TD) @ sae.W_enc + sae.b_enc
            if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
                pre_TF = pre_TF * sae.W_dec.norm(dim=-1)
            found.append((*sae.encode(resid_TD).topk(k), pre_TF))
    return found


def main() -> None:
    """Compare and write the result file."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    suite = sys.argv[2] if len(sys.argv) > 2 else "sql"
    console = Console()
    summary = json.loads((out / "summary.json").read_text())
    settings = summary["settings"]
    base, k = Path(settings["base"]["model"]), settings["k"]
    layer = int(settings["hook_name"].split(".")[1])
    sae = SAE.load_from_disk(settings["sae"]["path"], device="cpu")
    store = Store(out / "store")
    prompts = [prompt for prompt in store.read_suites(settings["suites_key"]) if prompt.suite == suite]
    suite_id = prompts[0].suite_id
    plain_base = plain_features(base, base, layer, sae, prompts, k)
    base_rows = store.read_rows(settings["unit_keys"]["base"])
    at_base = base_rows.suite_N == suite_id
    totals = {
        "candidates": 0,
        "tokens": 0,
        "same overlap": 0,
        "differ by proven ties": 0,
        "differ otherwise": 0,
    }

    def sets(rows: Any, picked: Any) -> list[set[int]]:
        return [set(row[row >= 0].tolist()) for row in rows.top_idx_NK[picked]]

    def kept(features: list[Any], number: int, position: int) -> set[int]:
        values, indices, _ = features[number]
        return set(indices[position][values[position] > 0].tolist())

    def tied(features: list[Any], number: int, position: int, differing: set[int]) -> bool:
        values, _, pre_TF = features[number]
        largest, smallest = values[position][0], values[position][-1]
        return all(abs(pre_TF[position][feature] - smallest) <= TIE * largest for feature in differing)

    ours_base = sets(base_rows, at_base)
    for row in summary["candidates"]:
        if row["status"] not in ("ok", "flagged"):
            continue
        path = Path(settings["candidates"]["path"]) / row["id"]
        plain = plain_features(path, base, layer, sae, prompts, k)
        rows = store.read_rows(row["unit_key"])
        totals["candidates"] += 1
        for ours_b, ours_c, number, position in zip(
            ours_base, sets(rows, at_base), rows.prompt_N[at_base], rows.position_N[at_base], strict=True
        ):
            plain_b, plain_c = kept(plain_base, number, position), kept(plain, number, position)
            totals["tokens"] += 1
            if len(ours_b & ours_c) == len(plain_b & plain_c):
                totals["same overlap"] += 1
            elif tied(plain_base, number, position, ours_b ^ plain_b) and tied(
                plain, number, position, ours_c ^ plain_c
            ):
                totals["differ by proven ties"] += 1
            else:
                totals["differ otherwise"] += 1
        console.print(f"{row['id']}: {totals}", highlight=False)
    date = datetime.now(UTC).date().isoformat()
    claim = {
        "name": "tokens whose overlap differs from the plain loop's for another reason than a tie",
        "value": totals["differ otherwise"],
        "target": 0,
        "met": totals["differ otherwise"] == 0,
        "device": f"cpu ({platform.machine()})",
    }
    result = {"date": date, "suite": suite, "k": k, "tie": TIE, "totals": totals, "claims": [claim]}
    path = Path(__file__).parent / "results" / f"oracle_cpu_{date}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"{path}: {'met' if claim['met'] else 'NOT met'}", highlight=False)
    sys.exit(not claim["met"])


if __name__ == "__main__":
    main()

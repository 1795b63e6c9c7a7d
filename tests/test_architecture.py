"""The rules between rooms, held by parsing every import."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ray_auditor"
KERNELS = ROOT / "kernels" / "auditor_kernels"
MAX_LINES = 320

# Each room may import rooms of its own line and of the lines before it.
ORDER = (
    (
        "config",
        "budget_config",
        "candidates_config",
        "reading_config",
        "screen_config",
        "shard",
        "unit",
        "work",
        "conformal",
        "durable_file",
        "interrupt",
    ),
    ("store", "ledger", "lease"),
    ("hub", "reduce"),
    ("sums", "suites", "sae_spec", "sae_fold", "sae", "rates", "features", "weight_change", "roster", "gate"),
    ("labels",),
    ("population",),
    ("standing",),
    ("flag",),
    ("report",),
    ("engine",),
    ("layout",),
    ("worker",),
    ("acknowledgement", "tables", "outputs", "reader", "drilldown", "showing", "serve"),
    ("usage", "engine_class", "cost", "progress_line"),
    ("budget",),
    ("calibration", "intake", "history"),
    ("plan", "reading"),
    ("stages",),
    ("forecast",),
    ("plan_file",),
    ("reduction", "details", "evaluation", "rivals"),
    ("screen",),
    ("preview",),
    ("conclusion", "evaluate"),
    ("dashboard",),
    ("cluster", "ray_metrics"),
    ("driver",),
    ("sweep", "doctor", "null"),
    ("calibrate",),
    ("demo",),
    ("__main__",),
)
ONLY_IN = {
    "vllm": {"engine"},
    "ray": {"cluster", "driver", "ray_metrics"},
    "hydra": {"__main__", "config"},
    "omegaconf": {"__main__", "config"},
    "sae_lens": {"sae"},
    "datasets": {"suites"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
}
WITHOUT_TORCH = {
    "store",
    "ledger",
    "lease",
    "candidates_config",
    "reading_config",
    "shard",
    "durable_file",
    "unit",
    "reduce",
    "rates",
    "conformal",
    "population",
    "standing",
    "sums",
    "evaluation",
    "evaluate",
    "rivals",
    "flag",
    "features",
    "labels",
    "report",
    "acknowledgement",
    "outputs",
    "tables",
    "reader",
    "drilldown",
    "showing",
    "serve",
    "reading",
    "config",
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "ray_auditor" else [str(node.module)]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_has_its_place_and_imports_no_room_above_it() -> None:
    level = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
    assert {room_of(path) for path in modules()} == level.keys()
    for path in modules():
        for name in imports_of(path):
            if name.startswith("ray_auditor.") and (other := name.split(".")[1]) in level:
                assert level[other] <= level[room_of(path)], (
                    f"{path.name} imports {other}, which lies above it"
                )


def test_heavy_packages_stay_in_their_rooms() -> None:
    for path in modules():
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in ONLY_IN:
                assert room_of(path) in ONLY_IN[top], f"{path.name} imports {top}"
            if top in {"torch", "auditor_kernels", "transformers"}:
                assert room_of(path) not in WITHOUT_TORCH, f"{path.name} imports {top}"


def test_the_kernels_import_torch_and_triton_only() -> None:
    assert not (KERNELS.parent / "__init__.py").exists(), "an importable `kernels` would break transformers"
    for path in KERNELS.rglob("*.py"):
        for name in imports_of(path):
            assert name.split(".")[0] not in {"ray_auditor", "numpy", "vllm", "ray"}, (
                f"{path.name} imports {name}"
            )


def test_a_file_can_be_read_in_one_sitting() -> None:
    for path in [*modules(), *KERNELS.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= MAX_LINES, f"{path} is too long: split it by noun"
        assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc", "manager"}

"""The verb `demo`: set the hub up, run the ordinary sweep on it, set the findings beside the labels."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ray_auditor.candidates_config import CandidatesConfig
from ray_auditor.config import AuditConfig, BaseConfig
from ray_auditor.demo import DemoError, prepare, print_verdict, read_labels
from ray_auditor.reading import read_summary
from ray_auditor.sweep import run_sweep

DEMO_DIR = Path("out/demo")
FINISHED = (0, 1)


def run_demo(config: AuditConfig) -> int:
    """Run the demo under `out_dir` (`out/demo` unless it is given).

    Returns:
        0 when the sweep finished, with or without findings: the demo's hub is meant to have some. Otherwise
        the sweep's exit code.
    """
    out_dir = DEMO_DIR if config.out_dir == AuditConfig().out_dir else Path(config.out_dir)
    console = Console()
    try:
        paths = prepare(out_dir, console)
    except DemoError as error:
        raise ValueError(str(error)) from error
    sweep = replace(
        config,
        out_dir=str(out_dir),
        candidates=CandidatesConfig(path=str(paths.candidates)),
        base=BaseConfig(model=str(paths.base)),
        sae=replace(config.sae, path=str(paths.sae)),
        suites=replace(config.suites, path=str(paths.suites)),
    )
    exit_code = run_sweep(sweep)
    print_verdict(read_summary(out_dir), read_labels(), out_dir / "report.html", console)
    return 0 if exit_code in FINISHED else exit_code

"""The command line: verbs, overrides, exit codes, and what a wrong one is told."""

import errno
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ray_auditor.__main__ import main, to_overrides
from ray_auditor.config import Verb
from ray_auditor.report.finding import exit_code_of
from tests.report.made_sweep import make_summary

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ray_auditor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_every_verb_and_group() -> None:
    for arguments in ((), ("--help",), ("sweep", "--help")):
        done = run(*arguments)
        assert done.returncode == 0
        for verb in Verb:
            assert f"  {verb}  " in done.stdout
        for group in ("candidates", "base", "sae", "suites", "engine", "cluster", "flag", "experiment"):
            assert f"\n{group}: " in done.stdout


def test_the_settings_can_be_printed_and_presets_added() -> None:
    done = run("sweep", "sae.k=8", "+experiment=nightly", "engine=gpu", "--cfg", "job", "--resolve")
    assert done.returncode == 0, done.stderr
    for line in ("verb: sweep", "  k: 8", "  bootstrap_samples: 10000", "  dtype: bfloat16"):
        assert line in done.stdout


@pytest.mark.parametrize(
    "text", ["José", "a=b", "it's", "a b", "${oc.env:HOME}", "back\\slash", "-dash", "[x]"]
)
def test_any_path_and_any_name_reach_the_settings_as_typed(
    text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", f"out_dir=/nowhere/{text}"]) == 4
    if "$" not in text:  # in an override an interpolation is one, as everywhere in Hydra
        assert f"got /nowhere/{text}: no summary.json" in capfd.readouterr().err
    assert main(["show", text, "--cfg", "job", "--package", "show"]) == 0
    shown = yaml.safe_load(capfd.readouterr().out)["candidate"]
    assert shown.replace("\\$", "$") == text


def test_jobs_that_would_share_an_out_dir_are_refused(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["report", "-m", "flag.seed=1,2", f"out_dir={tmp_path / 'x'}"]) == 4
    assert "out_dir must differ between jobs" in capfd.readouterr().err


def test_a_file_that_is_no_summary_is_named(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for text, said in (("{}", "it has no candidates"), ("[]", "it has no candidates"), ("{", "must be JSON")):
        (tmp_path / "summary.json").write_text(text)
        assert main(["report", f"out_dir={tmp_path}"]) == 4
        assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sae.k=0", "sae.k must be in [1, 128], got 0"),
        ("sae.k=129", "sae.k must be in [1, 128], got 129"),
        ("sae.k=many", "many"),
        ("sae.kk=3", "sae.kk"),
        ("saes.k=3", "saes"),
        ("saek=3", "sae.k"),
        ("candidates.pth=x", "got 'candidates.pth'; nearest: candidates.path"),
        ("+sae.kk=3", "sae.kk"),
        ("engine=tpu", "tpu"),
        ("engine.dtype=int3", "int3"),
        (
            "engine.max_step_prompts=4096",
            "engine.max_step_prompts must be <= engine.max_step_tokens=2048, got 4096",
        ),
        ("engine.max_lora_rank=-1", "engine.max_lora_rank must be >= 0"),
        ("cluster.num_workers=0", "cluster.num_workers must be >= 1, got 0"),
        ("flag.confidence=1.0", "flag.confidence must be in [0.5, 1), got 1.0"),
        ("flag.min_z=inf", "flag.min_z must be > 0 and finite, got inf"),
        ("flag.seed=-1", "flag.seed must be >= 0, got -1"),
        ("cluster.unit_timeout_s=inf", "cluster.unit_timeout_s must be > 0 and finite, got inf"),
        ("suites.max_tokens=1", "suites.max_tokens must be in [8, 131072], got 1"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_loads(
    override: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", override]) == 4
    assert said in capfd.readouterr().err


def test_a_missing_source_is_named(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = [f"candidates.path={tmp_path}", f"base.model={tmp_path}", f"suites.path={tmp_path}"]
    for number, name in enumerate(("candidates.path", "base.model", "suites.path", "sae.path")):
        assert main(["sweep", *given[:number]]) == 4
        assert f"error: {name} must be given" in capfd.readouterr().err


def test_a_job_with_findings_stands_before_one_with_nothing_to_audit(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = make_summary()
    found["candidates"] = [row for row in found["candidates"] if row["status"] != "failed"]
    nothing = found | {"flags": [], "details": {}, "candidates": found["candidates"][-3:-1]}
    nothing["candidates"] = [row | {"status": "rejected"} for row in nothing["candidates"]]
    for name, summary in {"found": found, "nothing": nothing}.items():
        (tmp_path / name).mkdir()
        whole = summary | {"counts": {}, "exit_code": exit_code_of(summary)}
        (tmp_path / name / "summary.json").write_text(json.dumps(whole))
        assert main(["report", f"out_dir={tmp_path / name}"]) == {"found": 1, "nothing": 3}[name]
    jobs = f"out_dir={tmp_path / 'found'},{tmp_path / 'nothing'}"
    assert main(["report", "-m", jobs, f"hydra.sweep.dir={tmp_path}"]) == 1


def test_several_jobs_give_the_gravest_exit_code(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["sweep", "-m", "sae.k=0,200", f"hydra.sweep.dir={tmp_path}"]) == 4
    said = capfd.readouterr().err
    assert "got 0" in said
    assert "got 200" in said


def test_words_become_overrides() -> None:
    assert to_overrides(["show", "org/a=b", "out_dir=x"])[-1] == "out_dir=x"
    assert to_overrides(["show", "m001", "out_dir=x"]) == ["verb=show", "show.candidate='m001'", "out_dir=x"]
    assert to_overrides(["show", "-odd", "out_dir=x"])[1] == "show.candidate='-odd'"
    assert to_overrides(["sweep", "sae.k=1", "--cfg", "job", "+b=2"]) == [
        "--cfg",
        "job",
        "verb=sweep",
        "sae.k=1",
        "+b=2",
    ]
    assert to_overrides([]) == ["--help"]
    with pytest.raises(ValueError, match="verb must be one of"):
        to_overrides(["swep"])


def test_a_word_that_is_no_override_is_named() -> None:
    with pytest.raises(ValueError, match=r"got 'm002'; CANDIDATE comes right after show"):
        to_overrides(["show", "m001", "m002", "out_dir=x"])
    for word in ("extra", ""):
        with pytest.raises(ValueError, match=f"words after sweep must be key=value, got '{word}'"):
            to_overrides(["sweep", word])
    given = ["plan", "+budget.prices.cpu=2", "budget.prices.cpu=2", "+experiment=nightly", "hydra.job.name=x"]
    assert to_overrides(given) == ["verb=plan", *given[1:]]


class Unread(io.StringIO):
    """A standard error whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, text)


@pytest.mark.parametrize("full", ["0", "1"])
def test_a_crash_never_ends_with_the_code_of_findings(full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a wrong setting: with errors in full, as Hydra advises, and when nobody reads them."""

    def crash(config: object) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setenv("HYDRA_FULL_ERROR", full)
    monkeypatch.setattr("ray_auditor.__main__.verb_function", lambda verb: crash)
    for stream in (io.StringIO(), Unread()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["report", "out_dir=x"]) == 2
        assert main(["report", "engine=tpu"]) == 4


def test_the_version_is_this_program_s(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("ray-auditor ")


def test_report_and_show_need_a_finished_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for verb in ("report", "show"):
        assert main([verb, f"out_dir={tmp_path}"]) == 4
        assert "run a sweep first" in capfd.readouterr().err


def test_assertions_must_be_on() -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-m", "ray_auditor", "plan"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert "-O" in done.stderr

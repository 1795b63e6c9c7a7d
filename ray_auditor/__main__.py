"""The door: `ray-auditor VERB [overrides]` -> one typed configuration -> one function -> an exit code."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ray_auditor.config import AuditConfig, Verb, register_schemas

USAGE_ERROR = 4


def config_dir() -> Path:
    """The YAML groups: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def verb_function(verb: Verb) -> Callable[[AuditConfig], int]:
    """The function behind a verb; imported late, so that `--help` and `show` load neither torch nor Ray."""
    if verb is Verb.sweep:
        from ray_auditor import sweep

        return sweep.run_sweep
    if verb is Verb.plan:
        from ray_auditor import plan

        return plan.print_plan
    if verb is Verb.demo:
        from ray_auditor.demo import run

        return run.run_demo
    if verb is Verb.doctor:
        from ray_auditor import doctor

        return doctor.run_doctor
    from ray_auditor import reading

    return reading.write_report if verb is Verb.report else reading.show_candidate


def to_overrides(arguments: Sequence[str]) -> list[str]:
    """Turn `VERB [CANDIDATE] overrides` into Hydra's arguments.

    Raises:
        ValueError: The first word is neither a verb, nor a flag, nor an override.
    """
    if not arguments:
        return ["--help"]
    first, *rest = arguments
    if first.startswith("-") or "=" in first:
        return list(arguments)
    if first not in set(Verb):
        raise ValueError(f"the verb must be one of {', '.join(Verb)}, got {first!r}; see ray-auditor --help")
    if rest and first == Verb.show and "=" not in rest[0] and not rest[0].startswith("-"):
        rest[0] = f"show.candidate='{rest[0]}'"
    if first == Verb.demo:
        rest = ["+experiment=demo", *rest]
    is_override = [word[0] in "+~" or ("=" in word and word[0] != "-") for word in rest]
    flags = [word for word, override in zip(rest, is_override, strict=True) if not override]
    # argparse takes the overrides as one run of words, so Hydra's own flags go before them.
    return [
        *flags,
        f"verb={first}",
        *(word for word, override in zip(rest, is_override, strict=True) if override),
    ]


def _say_usage(error: ValueError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return USAGE_ERROR


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: Command line without the program's name; None takes the process's own.

    Returns:
        0 nothing stands out, 1 findings, 2 some candidates failed, 3 nothing to audit, 4 usage,
        130 interrupted. With several jobs (`-m`), the largest.
    """
    if not __debug__:
        return _say_usage(
            ValueError("python -O must be off, got -O; the program's invariants are assertions")
        )
    exit_codes: list[int] = []

    def run(settings: DictConfig) -> None:
        try:
            config = OmegaConf.to_object(settings)
            assert isinstance(config, AuditConfig)
            exit_codes.append(verb_function(config.verb)(config))
        except ValueError as error:
            exit_codes.append(_say_usage(error))

    register_schemas()
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    try:
        overrides = to_overrides(sys.argv[1:] if arguments is None else arguments)
        sys.argv = ["ray-auditor", *overrides]
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(run)()
    except ValueError as error:
        return _say_usage(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: what was committed is kept; run the same command again to go on\n")
        return 130
    except SystemExit as stop:
        # Hydra has printed what it could not compose: an unknown key, a wrong type, an unknown group.
        return USAGE_ERROR if stop.code else 0
    return max(exit_codes, default=0)


if __name__ == "__main__":
    sys.exit(main())

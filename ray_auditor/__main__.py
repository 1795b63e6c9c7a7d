"""The door: `ray-auditor VERB [overrides]` -> one typed configuration -> one function -> an exit code."""

import contextlib
import difflib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf

from ray_auditor.config import AuditConfig, Verb, register_schemas
from ray_auditor.interrupt import INTERRUPTED, run_interruptibly

INTERNAL_ERROR, USAGE_ERROR = 2, 4
GRAVITY = (0, 3, 1, 2, 4)  # exit codes, the gravest last: findings of one job stand before nothing in another
# What the words after a verb are, that are no overrides.
WORDS = {"show": ("candidate",), "ack": ("candidate",), "diff": ("before", "after")}
HOW_TO_DIFFER = "say, for one, out_dir='out/k${sae.k}'"
# What Hydra reads as it stands: plain characters, a list, a quoted string.
PLAIN = re.compile(r"[A-Za-z0-9_./:,@%+*?$(){}~-]*|[\[{].*|(?P<q>['\"]).*(?P=q)")


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
        from ray_auditor import preview

        return preview.print_plan
    if verb is Verb.demo:
        from ray_auditor.demo import run

        return run.run_demo
    if verb is Verb.calibrate:
        from ray_auditor import calibrate

        return calibrate.run_calibrate
    if verb is Verb.null:
        from ray_auditor.null.run import run_null

        return run_null
    if verb is Verb.evaluate:
        from ray_auditor import evaluate

        return evaluate.evaluate
    if verb is Verb.doctor:
        from ray_auditor import doctor

        return doctor.run_doctor
    if verb is Verb.serve:
        from ray_auditor.serve.app import run_serve

        return run_serve
    from ray_auditor import reading

    verbs = {
        Verb.report: reading.write_report,
        Verb.show: reading.show_candidate,
        Verb.ack: reading.run_ack,
        Verb.diff: reading.run_diff,
    }
    return verbs[verb]


def to_overrides(arguments: Sequence[str]) -> list[str]:
    """Turn `VERB [WORD ...] overrides` into Hydra's arguments.

    Raises:
        ValueError: The first word is neither a verb, nor a flag, nor an override; a later one is no
            override, or of no setting.
    """
    if not arguments:
        return ["--help"]
    first, *rest = arguments
    if first.startswith("-") or "=" in first:
        return list(arguments)
    if first not in set(Verb):
        raise ValueError(f"the verb must be one of {', '.join(Verb)}, got {first!r}; see ray-auditor --help")
    overrides = [f"verb={quote(first) if first == Verb.null else first}"]  # a bare null is None to Hydra
    for name in WORDS.get(first, ()):
        if rest and not rest[0].startswith(("--", "out_dir=", f"{first}.")):
            overrides.append(f"{first}.{name}={quote(rest.pop(0))}")
    if first == Verb.demo:
        overrides.append("+experiment=demo")
    _check_words(first, rest)
    # argparse takes the overrides as one run of words, so Hydra's own flags go before them.
    flags = [word for word in rest if word[0] not in "+~" and ("=" not in word or word[0] == "-")]
    overrides += [quote_value(word) for word in rest if word not in flags]
    return [*flags, *overrides]


def _check_words(verb: str, words: Sequence[str]) -> None:
    """Check what Hydra would answer with its grammar, or with the advice to add what nothing reads."""
    known = ["experiment", *_settings(OmegaConf.structured(AuditConfig))]
    for before, word in pairwise(["", *words]):
        key, equals, _ = word.partition("=")
        if not word or not (equals or word[0] in "-+~" or before.startswith("-")):
            names = " ".join(name.upper() for name in WORDS.get(verb, ()))
            remedy = f"{names} comes right after {verb}" if names else "see ray-auditor --help"
            raise ValueError(f"words after {verb} must be key=value, got {word!r}; {remedy}")
        if key[:1] in {"", "-", "+", "~"} or not equals or "@" in key or key.startswith(("hydra.", "hydra/")):
            continue
        if key not in known and not key.startswith("budget.prices."):
            near = difflib.get_close_matches(key, known, n=3)
            remedy = f"nearest: {', '.join(near)}" if near else "correct it"
            raise ValueError(
                f"a setting must be one of those that ray-auditor --help lists, got {key!r}; {remedy}"
            )


def _settings(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The names of all settings, and of the groups that hold them."""
    for name in map(str, node):
        yield prefix + name
        if OmegaConf.is_dict(node[name]):
            yield from _settings(node[name], f"{prefix}{name}.")


def quote(text: str) -> str:
    """A string as Hydra's grammar reads back unchanged, interpolation switched off.

    A backslash is itself there, except before a quote.
    """
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text.replace("${", r"\${"))
    return f"'{escaped}'"


def quote_value(override: str) -> str:
    """Quote a value that holds what Hydra's grammar gives a meaning and a path does not."""
    key, _, value = override.partition("=")
    return override if not value or PLAIN.fullmatch(value) else f"{key}={quote(value)}"


def _say_usage(error: ValueError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return USAGE_ERROR


def program() -> NoReturn:
    """`main` as a shell runs it."""
    sys.exit(run_interruptibly(main))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: Command line without the program's name; None takes the process's own.

    Returns:
        0 nothing stands out, 1 findings, 2 some candidates failed, 3 nothing to audit, 4 usage,
        130 interrupted. With several jobs (`-m`), the gravest.
    """
    if not __debug__:
        return _say_usage(
            ValueError("python -O must be off, got -O; the program's invariants are assertions")
        )
    exit_codes: list[int] = []
    out_dirs: list[str] = []

    def run(settings: DictConfig) -> None:
        try:
            config = OmegaConf.to_object(settings)
            assert isinstance(config, AuditConfig)
            if config.out_dir in out_dirs:
                raise ValueError(
                    f"out_dir must differ between jobs, got {config.out_dir} again; {HOW_TO_DIFFER}"
                )
            out_dirs.append(config.out_dir)
            exit_codes.append(verb_function(config.verb)(config))
        except ValueError as error:
            exit_codes.append(_say_usage(error))

    given = sys.argv[1:] if arguments is None else arguments
    if list(given) == ["--version"]:  # Hydra would print its own
        sys.stdout.write(f"ray-auditor {version('ray-auditor')}\n")
        return 0
    register_schemas()
    try:
        overrides = to_overrides(given)
        sys.argv = ["ray-auditor", *overrides]
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(run)()
    except ValueError as error:
        return _say_usage(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: what was committed is kept; run the same command again to go on\n")
        return INTERRUPTED
    except SystemExit as stop:
        # Hydra has printed what happened: a job that broke, or settings it could not compose (an unknown key,
        # a wrong type, an unknown group).
        if not stop.code:
            return 0
        return INTERNAL_ERROR if len(out_dirs) > len(exit_codes) else USAGE_ERROR
    except Exception:
        # Under HYDRA_FULL_ERROR, or where Hydra could not print: Python would end with the code of findings.
        with contextlib.suppress(OSError):
            traceback.print_exc()
        return INTERNAL_ERROR if len(out_dirs) > len(exit_codes) else USAGE_ERROR
    return max(exit_codes, key=GRAVITY.index, default=0)


if __name__ == "__main__":
    program()

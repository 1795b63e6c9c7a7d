"""What `calibrate` found out about a base, kept beside the units: `calibrations/<key>.json`.

The key is the stratum of the base's unit: base, SAE, hook, suites, k and engine class. A sweep of the same
stratum takes its floors from it; the fits of any calibration of the same base, SAE and k bound the SAE gate.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_auditor.durable_file import put_file
from ray_auditor.gate import Fit
from ray_auditor.store import Unit

CALIBRATION_VERSION = 1
SAME_GATE = ("base_key", "sae_key", "hook_name", "k")


@dataclass(frozen=True)
class Variant:
    """The base against itself in one other way.

    Attributes:
        name: Such as `batching` or `dtype bfloat16`.
        what: What differs, in words.
        engine_class: Under which it ran.
        unit_key: Its unit; None when it was not measured.
        reason: Why it was not measured; None when it was.
        shift: Suite -> k (as text, for JSON) -> mean shift of a token.
        fit: Suite -> fvu and l0 of this variant.
    """

    name: str
    what: str
    engine_class: str
    unit_key: str | None
    reason: str | None
    shift: Mapping[str, Mapping[str, float]]
    fit: Mapping[str, Fit]


@dataclass(frozen=True)
class Calibration:
    """The noise floor of a base; `fit` is the base's own, by suite, as in every variant."""

    schema_version: int
    key: str
    unit: Mapping[str, Any]
    fit: Mapping[str, Fit]
    variants: tuple[Variant, ...]
    generated_at: str

    def floors(self, k: int) -> dict[str, float]:
        """Suite -> the largest mean shift among variants of the calibration's own engine class."""
        own = [one.shift for one in self.variants if one.engine_class == self.unit["engine_class"]]
        return {
            suite: max((shift[suite][str(k)] for shift in own if shift), default=0.0) for suite in self.fit
        }


def write_calibration(root: Path, calibration: Calibration) -> Path:
    """Put a calibration into a store, in place of an earlier one of the same key."""
    folder = root / "calibrations"
    folder.mkdir(exist_ok=True)
    path = folder / f"{calibration.key}.json"
    data = json.dumps(asdict(calibration), indent=1, sort_keys=True, allow_nan=False).encode()
    put_file(path, data, temp=root / "tmp", replace=True)
    return path


def read_calibration(root: Path, key: str) -> Calibration | None:
    """The calibration of a stratum, None when there is none.

    Raises:
        ValueError: It is there and not one of this release.
    """
    path = root / "calibrations" / f"{key}.json"
    return _parse(path) if path.is_file() else None


def recorded_fits(root: Path, unit: Unit) -> list[Fit]:
    """Fits of the base, a suite each, in every calibration of the unit's base, SAE, hook and k.

    Raises:
        ValueError: One is not of this release.
    """
    found = [_parse(path) for path in sorted((root / "calibrations").glob("*.json"))]
    wanted = {name: getattr(unit, name) for name in SAME_GATE}
    same = [one for one in found if wanted.items() <= one.unit.items()]
    return [fit for one in same for fit in one.fit.values()]


def _parse(path: Path) -> Calibration:
    try:
        fields = json.loads(path.read_bytes())
        version = fields["schema_version"]
        if version != CALIBRATION_VERSION:
            raise ValueError(f"schema version {version!r}, this release reads {CALIBRATION_VERSION}")
        if fields["key"] != path.stem:
            raise ValueError("it is the calibration of another key")
        fields["fit"] = {suite: Fit(**fit) for suite, fit in fields["fit"].items()}
        fields["variants"] = tuple(
            Variant(**one | {"fit": {suite: Fit(**fit) for suite, fit in one["fit"].items()}})
            for one in fields["variants"]
        )
        return Calibration(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used ({error}); delete it and run calibrate again") from error

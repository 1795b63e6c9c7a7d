"""Settings of the verbs that read a finished sweep."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(kw_only=True, slots=True)
class ShowConfig:
    """What `show` prints: a candidate, or one of its features, or one of its prompts."""

    candidate: str | None = None
    suite: str | None = None
    feature: int | None = None
    prompt: int | None = None  # of the suite


@dataclass(kw_only=True, slots=True)
class AckConfig:
    """Which findings `ack` acknowledges, and what it keeps of that."""

    candidate: str | None = None
    suite: str | None = None  # None: all of the candidate's findings
    who: str | None = None
    why: str | None = None
    until: str | None = None  # the last day, YYYY-MM-DD


class Format(StrEnum):
    """Whom something is printed for. OmegaConf reads enums by member name."""

    terminal = "terminal"
    json = "json"


@dataclass(kw_only=True, slots=True)
class DiffConfig:
    """The two finished sweeps that `diff` compares, by their `out_dir`."""

    before: str | None = None
    after: str | None = None
    format: Format = Format.terminal


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """Where `serve` listens, on this machine's loopback alone."""

    port: int = 8477  # 0 takes any that is free

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"serve.port must be in [0, 65535], got {self.port}; 0 takes any that is free")

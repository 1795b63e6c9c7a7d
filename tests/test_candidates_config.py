"""Settings of a source: what is missing and what is too much is said before anything is read."""

from typing import Any

import pytest

from ray_auditor.candidates_config import CandidatesConfig, DownloadConfig, Source


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "x"},
        {"source": Source.manifest, "path": "x.csv", "limit": 3},
        {"source": Source.objects, "url": "s3://b/p"},
        {"source": Source.hub, "base_model": "org/base", "relations": ["merge"], "exclude": ["*-gguf"]},
    ],
)
def test_a_source_with_what_it_reads_is_complete(settings: dict[str, Any]) -> None:
    CandidatesConfig(**settings).require()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "candidates.path must be given, got None; add candidates.path=DIR"),
        ({"source": Source.objects}, "candidates.url must be given, got None; add candidates.url=s3://"),
        ({"source": Source.hub}, "which is a whole hub; add candidates.base_model=NAME"),
        ({"path": "x", "author": "org"}, "candidates.author must be left out with candidates=folder"),
        ({"source": Source.hub, "author": "a", "path": "x"}, "candidates.path must be left out with"),
        ({"source": Source.manifest, "path": "x", "tags": ["en"]}, "candidates.tags must be left out with"),
        ({"source": Source.hub, "author": "a", "limit": 0}, "candidates.limit must be >= 1, got 0"),
        (
            {"source": Source.hub, "author": "a", "relations": ["twin"]},
            "candidates.relations must be some of",
        ),
    ],
)
def test_what_is_missing_or_would_be_ignored_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="candidates") as caught:
        CandidatesConfig(**settings).require()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"num_parallel": 0}, {"stall_s": 0.5}, {"max_attempts": 0}, {"min_free_bytes": -1}]
)
def test_downloads_are_bounded(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"download.{next(iter(settings))} must be"):
        DownloadConfig(**settings)

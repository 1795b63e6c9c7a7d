"""Keys that open accounts: who may hold them, and nobody else."""

import os
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

# HF_TOKEN and its older names, and what the clouds' own tools read.
_NAME = re.compile(
    r"(HF|HUGGING_FACE|HUGGINGFACE)_.*TOKEN"
    r"|(AWS|AZURE|GOOGLE|GCP|GCS)_.*(TOKEN|SECRET|KEY|KEY_ID|PASSWORD|CREDENTIALS|CONNECTION_STRING|SAS)"
    r"|(AZURE_STORAGE|GOOGLE_APPLICATION|AWS_CONTAINER)_.*"
)


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name opens an account."""
    return _NAME.fullmatch(name.upper()) is not None


def drop_secrets(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Remove every secret; returns what was removed."""
    return {name: environ.pop(name) for name in list(environ) if is_secret(name)}


@contextmanager
def without_secrets() -> Iterator[None]:
    """Processes started inside inherit no secret."""
    dropped = drop_secrets(os.environ)
    try:
        yield
    finally:
        os.environ.update(dropped)

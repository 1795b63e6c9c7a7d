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
# What keeps the hub's client, and those built on it, from the network and from a token on disk.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_TOKEN_PATH": os.devnull,
}


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name opens an account."""
    return _NAME.fullmatch(name.upper()) is not None


def drop_secrets(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Remove every secret; returns what was removed."""
    return {name: environ.pop(name) for name in list(environ) if is_secret(name)}


def go_offline() -> None:
    """Take from this process every key, and the hub with it, though its client may be imported already."""
    from huggingface_hub import constants

    drop_secrets(os.environ)
    os.environ.update(OFFLINE)
    constants.HF_HUB_OFFLINE = True


@contextmanager
def without_secrets() -> Iterator[None]:
    """Processes started inside inherit no secret, and find no hub."""
    kept = dict(os.environ)
    drop_secrets(os.environ)
    os.environ.update(OFFLINE)
    try:
        yield
    finally:
        for name in OFFLINE.keys() - kept.keys():
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in kept.items() if name in OFFLINE or is_secret(name)})

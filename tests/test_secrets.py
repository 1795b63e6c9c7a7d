"""Processes that load weights: no key, no token on disk, no hub."""

import os
import sys
from typing import Any

import huggingface_hub.constants
import pytest
import ray

from ray_auditor.cluster import cluster
from ray_auditor.config import ClusterConfig
from ray_auditor.hub.secret import go_offline, is_secret, without_secrets
from tests.hub.hub_server import HubServer, serving

SECRETS = {
    "HF_TOKEN": "sentinel",
    "HUGGING_FACE_HUB_TOKEN": "sentinel",
    "AWS_ACCESS_KEY_ID": "sentinel",
    "AWS_SECRET_ACCESS_KEY": "sentinel",
    "AWS_SESSION_TOKEN": "sentinel",
    "AZURE_STORAGE_ACCOUNT_KEY": "sentinel",
    "AZURE_STORAGE_SAS_KEY": "sentinel",
    "AZURE_CLIENT_SECRET": "sentinel",
    "GOOGLE_APPLICATION_CREDENTIALS": "sentinel",
    "GOOGLE_SERVICE_ACCOUNT_KEY": "sentinel",
}


@pytest.mark.parametrize("name", SECRETS)
def test_what_opens_an_account_is_known_by_its_name(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["AWS_REGION", "AWS_ENDPOINT", "HF_HOME", "HF_ENDPOINT", "PATH", "RAY_AUTH_TOKEN"]
)
def test_what_opens_none_is_left_alone(name: str) -> None:
    assert not is_secret(name)


def test_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "sentinel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    before = dict(os.environ)
    with without_secrets():
        assert "sentinel" not in os.environ.values()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        os.environ["SET_INSIDE"] = "kept"
    assert dict(os.environ) == before | {"SET_INSIDE": "kept"}
    monkeypatch.delenv("SET_INSIDE")


class Prober:
    """What a worker's process can see, before and after a worker's first step."""

    def look(self) -> tuple[dict[str, str], dict[str, str], str]:
        import psutil
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        born_with = psutil.Process().environ()
        go_offline()
        try:
            HfApi().model_info("org/model")
        except OfflineModeIsEnabled:
            return born_with, dict(os.environ), "offline"
        return born_with, dict(os.environ), "online"


def test_workers_are_born_without_keys_and_cannot_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    this = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(this)
    with serving(HubServer()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with cluster(ClusterConfig()):
            actor: Any = ray.remote(Prober).remote()
            born_with, environ, state = ray.get(actor.look.remote())
        assert not server.requests
    ray.cloudpickle.unregister_pickle_by_value(this)
    assert state == "offline"
    for seen in (born_with, environ):
        assert "sentinel" not in seen.values()
        assert seen["HF_HUB_OFFLINE"] == "1"
        assert seen["HF_TOKEN_PATH"] == os.devnull
    assert os.environ["HF_TOKEN"] == "sentinel"  # the driver keeps it, for the downloads


def test_a_process_goes_offline_though_the_client_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    before = dict(os.environ)
    try:
        go_offline()
        assert huggingface_hub.constants.is_offline_mode()
    finally:
        os.environ.clear()
        os.environ.update(before)

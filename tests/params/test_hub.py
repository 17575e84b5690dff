from __future__ import annotations

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from llmir_iree.params import SourceError, open_checkpoint


def test_hub_id_is_downloaded_and_read(make_folder, weights, monkeypatch):
    folder = make_folder(weights)
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **options: calls.append((repo, options)) or str(folder)
    )
    with open_checkpoint("org/tiny-llama") as checkpoint:
        assert checkpoint.source == "org/tiny-llama"
        assert set(checkpoint.tensors) == set(weights)
    ((repo, options),) = calls
    assert repo == "org/tiny-llama"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any("bin" in pattern or "pt" in pattern for pattern in options["allow_patterns"])


def test_unreachable_hub_is_one_line(monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(SourceError) as caught:
        open_checkpoint("org/tiny-llama")
    assert str(caught.value) == "org/tiny-llama is not a local path and cannot be fetched from the hub: no route"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RepositoryNotFoundError, "org/nope is neither a local path nor a repository on the hub"),
        (GatedRepoError, "org/nope is gated; accept its licence on the hub and run `hf auth login`"),
    ],
)
def test_refused_repository_is_one_line(kind, message, monkeypatch):
    error = kind.__new__(kind)  # its __init__ wants the response of a server

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(SourceError) as caught:
        open_checkpoint("org/nope")
    assert str(caught.value) == message

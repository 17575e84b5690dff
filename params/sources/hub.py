"""Downloads a checkpoint from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from llmir_iree.params.errors import SourceError

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_UNWANTED = ["*/*", "consolidated*"]  # copies in other layouts: Meta's "original/", Mistral's own file


def download_checkpoint(repo_id: str) -> Path:
    """Fetch the safetensors, config and tokenizer files of a repository, or find them in the hub's local cache.

    Raises:
        SourceError: the repository does not exist, is gated, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError:
        raise SourceError(f"{repo_id} is gated; accept its licence on the hub and run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise SourceError(f"{repo_id} is neither a local path nor a repository on the hub") from None
    except Exception as error:  # the hub's client raises what its transport raises, and that has changed before
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(f"{repo_id} is not a local path and cannot be fetched from the hub: {reason[0]}") from error

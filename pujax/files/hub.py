"""A model on its way to the hub."""

import re
from pathlib import Path

from pujax.errors import ConfigError


def require_hub(name: str) -> None:
    """Raise `ConfigError` unless `name` can name a repository and there is a token to push with."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"push={name!r}: write OWNER/NAME, as the hub calls a model")
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(f"push={name}: no token for the hub: `hf auth login`, or set HF_TOKEN")


def push(name: str, files: dict[str, Path | bytes]) -> str:
    """Put `files`, by their names there, into the model `name` as one commit; its address.

    A model that is not there yet is made, and is private until its owner says otherwise. Raises
    `ConfigError` where the hub does not take them.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    # From there, not from a client of ours: it is the hub's own client that raises it.
    from huggingface_hub.errors import (
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        OfflineModeIsEnabled,
    )

    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        told = hub.create_commit(
            name,
            [
                CommitOperationAdd(path, str(f) if isinstance(f, Path) else f)
                for path, f in files.items()
            ],
            commit_message="Written by pujax",
        )
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"push={name}: the hub did not take it ({reason}): what was written here stays; see to "
            "the token's rights, the name and the network, and export again"
        ) from error
    return str(told.repo_url)

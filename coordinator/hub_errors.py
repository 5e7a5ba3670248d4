"""What a hub or the disk says when a download fails, as what a person can do about it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Neither module declares what it re-exports; TransportError is httpx's or httpx2's, whichever the library uses.
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

from cluster.errors import ModelError


class Unreachable(ModelError):
    """The hub does not answer; a cached copy may do."""


@contextlib.contextmanager
def explained(repository: str, revision: str) -> Iterator[None]:
    """Turn what the hub or the disk says into what a person can do about it."""
    hub = constants.ENDPOINT
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(f"{repository} is gated: ask for access at {hub}/{repository}, then {login}") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repository} has no revision {revision!r} at {hub}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{hub} shows no model {repository}, and there is no such folder here. Check the spelling; "
            f"if the model is private, {login}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ModelError(f"{hub} refuses {repository} (HTTP status {status}): {login}") from error
        raise Unreachable(f"{hub} failed on {repository} (HTTP status {status}); try again later") from error
    except (TransportError, LocalEntryNotFoundError) as error:
        raise Unreachable(f"cannot reach {hub} to download {repository}: {error}. Check the network") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "is full: free some space, or set HF_HOME to a folder on a larger disk"
            raise ModelError(f"the disk of {constants.HF_HUB_CACHE} {advice}. What arrived is kept") from error
        raise ModelError(f"downloading {repository} to {constants.HF_HUB_CACHE} failed: {error}") from error

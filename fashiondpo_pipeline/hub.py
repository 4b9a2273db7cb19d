"""Files of the model hub: out of its cache where there is no network, and missing in seconds, not after the client's retries."""

from functools import cache
from pathlib import Path

PATIENCE = 5.0  # seconds in which the hub must say that it is there


class Unreachable(ConnectionError):
    """The hub does not answer, and what was asked for is not in its cache."""


def fetch(repository: str, file: str, revision: str | None) -> Path:
    """One file of a repository, downloaded unless it is in the cache. Raises Unreachable, or what the hub's client raises."""
    from huggingface_hub import hf_hub_download, hf_hub_url

    silence = _silence(hf_hub_url(repository, file, revision=revision))
    if silence is None:
        return Path(hf_hub_download(repository, file, revision=revision))
    try:
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=True))
    except (OSError, ValueError) as problem:
        raise Unreachable(f"the hub does not answer ({silence})") from problem


@cache
def _silence(url: str) -> str | None:
    """Why the hub does not answer; None if it does, whatever it says. It is asked once."""
    import httpx2
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        get_hf_file_metadata(url, timeout=PATIENCE)
    except (httpx2.TransportError, OfflineModeIsEnabled) as problem:
        return (str(problem).splitlines() or [type(problem).__name__])[0]
    except (OSError, ValueError):  # its client says best what was answered
        pass
    return None

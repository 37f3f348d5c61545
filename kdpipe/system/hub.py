"""The Hugging Face Hub, where there may be no network."""

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_retries() -> Iterator[None]:
    """Let the hub's client look only into its cache where the hub does not answer: it would try for a minute."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = (
        constants.HF_HUB_OFFLINE,
        constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT),
    )
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    """Whether anything answers at an address, whatever it says."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
    except urllib.error.URLError as error:
        # Certificates that Python does not know may be known to the client.
        return isinstance(error, urllib.error.HTTPError) or isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True

"""How long a hub that is busy is left alone, and how often it is asked again.

Owns which answers mean "later" and the waiting between two tries; knows nothing of what is asked.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from cluster.errors import ModelError

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

_TRANSIENT = (408, 429, 500, 502, 503, 504)
_TRIES_MAX = 5  # without being told for how long, they take 7.5 s together
_RETRY_DELAY_MAX_S = 8.0
_ASKED_DELAY_MAX_S = 300.0  # the hub counts requests over five minutes; whoever asks for more is not believed
_RATE_LIMIT = re.compile(r'"\w+"\s*;\s*r=0\s*;\s*t=(\d{1,6})', re.ASCII)


def is_transient(error: HfHubHTTPError) -> bool:
    """Whether the same request may be answered later."""
    return error.response.status_code in _TRANSIENT


def pause_s(tries: int, asked_delay_s: float = 0.0) -> float:
    """How long to wait after so many tries in vain; not less than the hub asks for."""
    return max(min(0.25 * 2.0**tries, _RETRY_DELAY_MAX_S), asked_delay_s)


def asked_delay_s(headers: Mapping[str, str]) -> float:
    """How long the hub asks to be left alone; 0 where it says nothing, or names a date."""
    text = headers.get("Retry-After", "")
    if limit := _RATE_LIMIT.search(headers.get("RateLimit", "")):
        text = limit[1]
    return min(float(text), _ASKED_DELAY_MAX_S) if text.isascii() and text.isdecimal() else 0.0


def patiently(ask: Callable[[], _T], what: str, cancelled: threading.Event | None = None) -> _T:
    """The answer to `ask`, which is repeated while the hub is busy, and raises its last error. `what` is asked for."""
    over = cancelled or threading.Event()
    for tries in range(1, _TRIES_MAX):
        try:
            return ask()
        except HfHubHTTPError as error:
            if not is_transient(error):
                raise
            wait_s = pause_s(tries, asked_delay_s(error.response.headers))
            status = error.response.status_code
            _log.warning(
                "%s answers HTTP status %d to the question for %s; asking again in %.3g s (%d of %d)",
                constants.ENDPOINT, status, what, wait_s, tries, _TRIES_MAX - 1,
            )  # fmt: skip
        if over.wait(wait_s):
            raise ModelError(f"asking for {what} was broken off")
    return ask()

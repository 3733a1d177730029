"""The Hub's client: one that names this library, its exceptions as ours, and trying again where what went wrong may pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from mats_hub import __version__
from mats_hub.errors import MatsError, SourceError

Result = TypeVar("Result")

TRIES = 3
"""How often the Hub is asked for something, when what went wrong may pass."""


def hub_api(token: str | bool | None = None) -> Any:
    """Return a Hub client that names this library to the server."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="mats_hub", library_version=__version__)


@contextmanager
def hub_errors(spec: str, error_class: type[MatsError] = SourceError) -> Iterator[None]:
    """Turn the Hub client's exceptions into one of ours that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise error_class(
            f"{spec!r} is gated: accept its terms on its page on the Hub, then sign in with 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise error_class(
            f"{spec!r} is not on the Hub, or is private and this machine's token cannot see it. Check the spelling, "
            "or sign in with 'hf auth login' (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise error_class(f"{spec!r}: the repository exists but not that revision; see its list of commits") from error
    except errors.OfflineModeIsEnabled as error:
        raise error_class(
            f"{spec!r} is needed from the Hub, but HF_HUB_OFFLINE is set and it is not in the cache. Unset it, "
            "or fetch it first with 'hf download'"
        ) from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "no"
        way_out = "sign in with 'hf auth login'" if code in (401, 403) else "try again later"
        message = str(error).strip().splitlines()
        raise error_class(
            f"{spec!r}: the Hub answered {code} ({message[-1] if message else 'no text'}); {way_out}"
        ) from error
    except (errors.HFValidationError, errors.EntryNotFoundError) as error:
        raise error_class(f"{spec!r}: {error}") from error
    except MatsError:
        raise
    except Exception as error:
        if not is_connection_error(error):
            raise
        raise error_class(
            f"{spec!r}: cannot reach the Hub ({type(error).__name__}). Check the network connection or HF_ENDPOINT; "
            "without a network HF_HUB_OFFLINE=1 takes what this machine's cache has, or use local folders"
        ) from error


def persistently(call: Callable[[], Result]) -> Result:
    """Return what a call of the Hub client returns, after trying again where what went wrong may pass.

    The client itself does so for some requests only, and not after a connection is reset.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for tries_left in reversed(range(TRIES)):
        try:
            return call()
        except Exception as error:
            status = (
                error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
            )
            passing = status >= 500 or (is_connection_error(error) and not isinstance(error, OfflineModeIsEnabled))
            if not tries_left or not passing:
                raise
            time.sleep(2 ** (TRIES - tries_left - 1))
    raise AssertionError("unreachable")


def is_connection_error(error: BaseException) -> bool:
    """Tell whether an exception of the Hub client means that no answer came."""
    # The client moved from httpx to httpx2 in 2.x: its transport errors are known by name, not by import.
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(names & {"TransportError", "RequestError", "ConnectError"})

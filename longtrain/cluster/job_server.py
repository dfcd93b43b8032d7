"""The connection to a Ray job server. The cluster's token travels in a request header and nowhere else."""

import ipaddress
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from longtrain.cluster.session import check_reachable
from longtrain.core.errors import LongtrainError, Refused

T = TypeVar("T")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PATIENCE_SECONDS = 120.0
"""How long a server that answered before may be out of reach."""
UNREACHABLE = (ConnectionError, requests.RequestException, aiohttp.ClientError)
"""What Ray's client raises where no answer came; it raises RuntimeError for an answer that is an error."""
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the job server at `address` (`http://HOST:PORT` or `HOST:PORT`; None: the environment's, else here).

    Raises Refused, in one line, where the server cannot be reached or used, and for an address beyond this machine
    without a token.
    """
    address = address or os.environ.get(_ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused(f"address={address} is not a job server; use http://HOST:8265")
    token = _token()
    if token is None and not _is_loopback(parts.hostname):
        raise Refused(
            f"address={address} is beyond this machine and there is no token for it; "
            "set RAY_AUTH_TOKEN_PATH, or put the cluster's token into ~/.ray/auth_token"
        )
    check_reachable("address", address, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    headers = {"Authorization": f"Bearer {token}"} if token else None
    try:
        with _only_this_address(url):
            return JobSubmissionClient(url, headers=headers)
    except (RuntimeError, AuthenticationError, *UNREACHABLE) as error:
        raise refusal(address, error) from error


def refusal(address: str, error: Exception) -> Refused:
    """What the server, or the way to it, had to say, in one line."""
    text = " ".join(str(error).split())
    if re.search(r"Authentication|Unauthori[sz]ed|\b40[13]\b", text):
        has = "was refused" if _token() else "is missing"
        return Refused(f"address={address}: the cluster's token {has}; set RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token")
    if "already exists" in text:
        return Refused(f"address={address}: another `longtrain submit` of this run came first; use `longtrain jobs`")
    return Refused(f"address={address}: {text[:200]}")


def _token() -> str | None:
    """The cluster's token, in Ray's own order of places. Raises Refused for a file that cannot be read."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        if named is None:
            return None
        raise Refused(f"RAY_AUTH_TOKEN_PATH={named} does not exist; write the cluster's token there") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); make it readable for you alone") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _only_this_address(url: str) -> Iterator[None]:
    # Ray lets this variable and RAY_ADDRESS win over the address that its client is given.
    before = os.environ.get(_ADDRESS_VARIABLE)
    os.environ[_ADDRESS_VARIABLE] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS_VARIABLE]
        else:
            os.environ[_ADDRESS_VARIABLE] = before


def patiently(ask: Callable[[], T]) -> T:
    """The answer to `ask`, which is repeated while the server is out of reach.

    Raises LongtrainError after PATIENCE_SECONDS, and at once where the server answers with an error.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except (RuntimeError, AuthenticationError, *UNREACHABLE) as error:
            reason = " ".join(str(error).split())[:200]
            if not isinstance(error, UNREACHABLE) and "status code 5" not in reason:
                raise LongtrainError(f"the job server answered: {reason}") from error
            if time.monotonic() > deadline:
                lost = f"the job server did not answer for {PATIENCE_SECONDS:g} s ({reason})"
                raise LongtrainError(f"{lost}; the job may go on: `longtrain jobs` tells") from error
            time.sleep(1.0)

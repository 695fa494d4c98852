"""One Hub endpoint: where it is, which token goes there, and how long to wait for it."""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ckpt_core.errors import ArgumentError, HubAuthError, HubError
from ckpt_core.hub import retries

if TYPE_CHECKING:
    from httpx2 import Client, Request, Response
    from huggingface_hub import HfApi

# Seconds without a single byte; a large upload may take hours as long as it moves.
CONNECT_SECONDS = 10.0
IDLE_SECONDS = 120.0
_CONFLICT = 409
_WAITING = (429, 503)  # the answers that may say how long to wait
_BEARER = "Bearer "

_homes: dict[str, set[str]] = {}
"""Of each token that was chosen in this process, the origins that it may be sent to."""


@dataclass(frozen=True)
class Connection:
    """An endpoint and the token that may be sent to it (`False`: none at all, not even one stored on the machine)."""

    endpoint: str
    token: str | bool = field(repr=False)

    @classmethod
    def open(cls, endpoint: str | None, token: str | None, *, write: bool = False) -> Self:
        """Choose endpoint and token: the arguments, else `HF_ENDPOINT` and `HF_TOKEN` or a stored login.

        Raises ArgumentError for an address that is none; HubAuthError where a token would travel in the clear, or where
        writing would need one and there is none.
        """
        from huggingface_hub import constants, get_token

        address = check_endpoint(endpoint or constants.ENDPOINT)
        token = token or get_token()
        local = is_loopback(address)
        if token and not local and urlsplit(address).scheme != "https":
            raise HubAuthError(f"{address}: a token is sent over https or to this machine only; use an https address")
        if token and local and (proxy := _proxy_to(address)):
            raise HubAuthError(
                f"{address}: is on this machine, but the environment's proxy {proxy} is in the way, and the token would"
                " travel to it in the clear; add 127.0.0.1,localhost to NO_PROXY"
            )
        if write and not token and not local:
            raise HubAuthError(
                f"{address}: no token found; set HF_TOKEN to one with write access, or run hf auth login"
            )
        if token:
            addresses = [address, constants.ENDPOINT] if token == get_token() else [address]
            _homes.setdefault(token, set()).update(_origin(each) for each in addresses)
        _install_hooks()
        return cls(endpoint=address, token=token or False)

    @cached_property
    def api(self) -> "HfApi":
        """The client, bound to this endpoint and token."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token)

    def hide_token(self, text: str) -> str:
        """Return the text without the token."""
        return text.replace(self.token, "<token>") if isinstance(self.token, str) else text


def child_environment(endpoint: str) -> dict[str, str]:
    """Return what to add to the environment of a child process that speaks to `endpoint`.

    The client reads it once, at its import. Raises ArgumentError for what is no address.
    """
    return {"HF_ENDPOINT": check_endpoint(endpoint)}


def check_endpoint(endpoint: str) -> str:
    """Return the address without a trailing slash; raises ArgumentError for one that is no http(s) address."""
    address = endpoint.rstrip("/")
    try:
        parts = urlsplit(address)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
        parts = urlsplit("")
    if not known:
        raise ArgumentError(f"{endpoint!r} is not the address of a Hub; write it like https://huggingface.co")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ArgumentError("the address of a Hub has no user, password, query or fragment; set HF_TOKEN instead")
    return address


def is_loopback(endpoint: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(endpoint).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _proxy_to(address: str) -> str | None:
    """Return the host of the proxy that the environment has for an http address, if it has one."""
    proxies, parts = getproxies(), urlsplit(address)
    proxy = proxies.get("http") or proxies.get("all")
    if parts.scheme != "http" or not proxy or proxy_bypass(parts.netloc):
        return None
    return urlsplit(proxy).hostname or "of no name"


def _install_hooks() -> None:
    """Have every request of this process's client go where it may and end when nothing comes for a while."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http  # pyright: ignore[reportPrivateUsage] the factory has a setter, no getter

    present = _http._GLOBAL_CLIENT_FACTORY  # pyright: ignore[reportPrivateUsage]
    if not isinstance(present, _HookedFactory):
        set_client_factory(_HookedFactory(present))


class _HookedFactory:
    """Makes the clients that another factory makes (a user's own may set a proxy), each with hooks.

    The deadline is a hook on each request, because many calls pass `timeout=None`, which outdoes a client's default.
    """

    def __init__(self, make_client: "Callable[[], Client]") -> None:
        self._make_client = make_client

    def __call__(self) -> "Client":
        client = self._make_client()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", []), _set_deadline, _keep_token_home],
            "response": [*hooks.get("response", []), _refuse_long_wait, _end_busy_loop],
        }
        return client


def _set_deadline(request: "Request") -> None:
    limits = {"connect": CONNECT_SECONDS, "read": IDLE_SECONDS, "write": IDLE_SECONDS, "pool": IDLE_SECONDS}
    asked = {name: value for name, value in request.extensions.get("timeout", {}).items() if value is not None}
    request.extensions["timeout"] = {**limits, **asked}


def _keep_token_home(request: "Request") -> None:
    """Send a token to no other address than its Hub's; the client sends it where an answer says to go on.

    That may be anywhere: for the next page of a list, or to confirm an upload.
    """
    token = request.headers.get("authorization", "").removeprefix(_BEARER)
    if token in _homes and _origin(str(request.url)) not in _homes[token]:
        del request.headers["authorization"]


def _origin(address: str) -> str:
    """Return scheme, host and port, as the client writes them."""
    from huggingface_hub.utils import httpx

    url = httpx.URL(address)
    return f"{url.scheme}://{url.netloc.decode()}"


def _refuse_long_wait(response: "Response") -> None:
    """End a call where the Hub asks for a long wait: the client would wait as long as it is told to."""
    if response.status_code not in _WAITING:
        return
    seconds = retries.asked_by(response.headers) or 0
    if seconds > retries.LONGEST_ASKED_S:
        raise HubError(
            f"{response.url.scheme}://{response.url.netloc.decode()}: HTTP {response.status_code}: the Hub wants no"
            f" request for {seconds:g} s; run it again then: what arrived is found and not sent twice"
        )


def _end_busy_loop(response: "Response") -> None:
    """Leave a loop of the client's: it asks for a new repository again and again while another one is being made."""
    from huggingface_hub.utils import httpx

    if response.status_code == _CONFLICT and response.url.path.endswith("/api/repos/create"):
        response.read()
        if "operation is in progress" in response.text:  # an error that passes, so that it is tried again, a few times
            raise httpx.RemoteProtocolError("the Hub is busy with another repository of this account")

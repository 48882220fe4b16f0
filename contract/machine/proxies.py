"""Which proxy a request goes through. Servers on this machine are asked directly, all others as
`http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` say.

Our own clients ask `proxy_for`. Libraries (MLflow's requests, Google's client) read the environment
themselves, and `ask_this_machine_directly` brings the same rule into it.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from collections.abc import Mapping, MutableMapping
from urllib.parse import SplitResult, urlsplit

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")  # noqa: S104  nothing listens by this
_DEFAULT_PORTS = {"http": 80, "https": 443}


def ask_this_machine_directly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds this machine to `no_proxy`, for libraries that read the environment. Changes nothing
    where no proxy is set.
    """
    # Elsewhere a lone `no_proxy` would hide the proxies of macOS's settings from urllib.
    if not any(_setting(environment, f"{scheme}_proxy") for scheme in ("http", "https", "all")):
        return
    entries = _entries(environment)
    missing = [name for name in _THIS_MACHINE if name not in entries]
    if missing and "*" not in entries:
        # Libraries differ in which spelling they read first.
        for name in ("no_proxy", "NO_PROXY"):
            environment[name] = ",".join([*entries, *missing])


def proxy_for(url: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The proxy through which `url` is asked; None for a direct connection.

    Raises ValueError for a proxy that nothing here can use.
    """
    parts = urlsplit(url)
    if not parts.hostname:  # a file, or "local"
        return None
    if _is_this_machine(parts.hostname) or _is_left_out(parts, _entries(environment)):
        return None
    for name in (f"{parts.scheme}_proxy", "all_proxy"):
        proxy = _setting(environment, name)
        if proxy:
            return _usable(name, proxy if "://" in proxy else f"http://{proxy}")
    return None


def way_to(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """For a message about `url`: the proxy on the way, and how to leave it out. Empty without."""
    proxy = proxy_for(url, environment)
    if proxy is None:
        return ""
    host = urlsplit(url).hostname
    return f" (through the proxy {without_password(proxy)}; no_proxy={host} asks it directly)"


def without_password(url: str) -> str:
    return re.sub("://.*@", "://***@", url)


def _setting(environment: Mapping[str, str], name: str) -> str:
    return (environment.get(name) or environment.get(name.upper()) or "").strip()


def _entries(environment: Mapping[str, str]) -> list[str]:
    entries = re.split(r"[,\s]+", _setting(environment, "no_proxy"))
    return [entry for entry in entries if entry]


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _is_left_out(parts: SplitResult, entries: list[str]) -> bool:
    """Whether `no_proxy` names the host: by name or domain, with a port or not, or by network."""
    host = (parts.hostname or "").lower()
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    for entry in map(str.lower, entries):
        if entry == "*" or _in_network(host, entry):
            return True
        name, colon, digits = entry.rpartition(":")
        if colon and digits.isdecimal() and (name.endswith("]") or ":" not in name):
            entry = name if int(digits) == port else ""
        domain = entry.removeprefix("*").removeprefix(".").strip("[]")
        if domain and (host == domain or host.endswith(f".{domain}")):
            return True
    return False


def _in_network(host: str, entry: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except (ValueError, TypeError):
        return False


def _usable(name: str, proxy: str) -> str:
    scheme = urlsplit(proxy).scheme
    if scheme in ("http", "https"):
        return proxy
    if scheme in ("socks5", "socks5h") and importlib.util.find_spec("socksio"):
        return proxy
    remedy = "set it to an http:// proxy, or name the host in no_proxy"
    if scheme.startswith("socks"):
        remedy = f"pip install 'httpx[socks]' 'requests[socks]', or {remedy}"
    raise ValueError(f"{name}: {without_password(proxy)} cannot be used from here; {remedy}")

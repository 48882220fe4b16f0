"""Whose certificates a TLS connection of ours trusts: those of SSL_CERT_FILE and SSL_CERT_DIR where
they are set, as with curl and Python itself; else the ones that come with the HTTP library.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, MutableMapping


def trusted(environment: Mapping[str, str] = os.environ) -> ssl.SSLContext | bool:
    """As httpx takes it. Raises ValueError for a file that holds no certificates."""
    file, folder = environment.get("SSL_CERT_FILE"), environment.get("SSL_CERT_DIR")
    if not file and not folder:
        return True
    try:
        return ssl.create_default_context(cafile=file or None, capath=folder or None)
    except OSError as error:
        name = "SSL_CERT_FILE" if file else "SSL_CERT_DIR"
        raise ValueError(
            f"{name}: {file or folder}: {error.strerror or error}; name a PEM file of certificates"
        ) from None


def tell_libraries(environment: MutableMapping[str, str] = os.environ) -> None:
    """MLflow's client knows SSL_CERT_FILE by another name."""
    if environment.get("SSL_CERT_FILE"):
        environment.setdefault("REQUESTS_CA_BUNDLE", environment["SSL_CERT_FILE"])

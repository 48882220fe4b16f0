"""Folders for temporary files: each user has their own, and sockets get short paths."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import pwd
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path

# Where a socket goes when TMPDIR is too long, as Python 3.14 does it by itself.
_SHORT = ("/tmp", "/var/tmp")  # noqa: S108
_SOCKET_BYTES = 107  # of a socket's path, without the zero at its end
# What multiprocessing adds: /pymp-xxxxxxxx/listener-xxxxxxxx
_LISTENER_BYTES = 32
_PRIVATE = 0o700


def user_name() -> str:
    """The name of this process's user; the number where it has no name, as in some containers."""
    # Not getpass: it believes the environment.
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def own_name(what: str) -> str:
    """`maskray-WHAT-USER`, a name that no other user takes in a folder that all share."""
    return f"maskray-{what}-{user_name().replace('/', '-')}"


def own_path(what: str) -> Path:
    """Where `own_folder` is, whether it was made or not."""
    return Path(tempfile.gettempdir()) / own_name(what)


def own_folder(what: str) -> Path:
    """This user's folder in the temporary folder; made if there is none, for no other user to read.

    Raises ValueError if it belongs to somebody else.
    """
    path = own_path(what)
    path.mkdir(mode=_PRIVATE, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise ValueError(f"{path}: belongs to another user; set TMPDIR to a folder of your own")
    return path


def scratch(what: str) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for one block, with the user's name in its own."""
    return tempfile.TemporaryDirectory(prefix=f"{own_name(what)}-")


def short_folder(most_bytes: int) -> str:
    """The temporary folder, or another one if its path is longer than `most_bytes`.

    Raises ValueError if none is short enough and can be written.
    """
    folders = (tempfile.gettempdir(), *_SHORT)
    for folder in folders:
        if len(os.fsencode(folder)) <= most_bytes and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ValueError(
        f"no folder for sockets, which takes a path of at most {most_bytes} bytes: TMPDIR "
        f"{folders[0]} is too long or cannot be written, nor can {' and '.join(_SHORT)}; "
        "set TMPDIR to a short path"
    )


def fork_server(preload: Sequence[str]) -> ForkServerContext:
    """Processes that fork from a server, which has imported `preload` and done nothing else.

    Raises ValueError if its socket has no place.
    """
    with _short_tempdir():
        # Makes the folder of this process's sockets, which its children inherit.
        folder = multiprocessing.util.get_temp_dir()
    if len(os.fsencode(folder)) + len("/listener-xxxxxxxx") > _SOCKET_BYTES:
        raise ValueError(f"{folder}: too long a path for sockets; set TMPDIR to a short path")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def end_with_starter() -> None:
    """Ends this process when the one that started it ends, however that ends.

    For processes of `fork_server`: their parent is the server, which outlives a killed starter as
    long as they do. It waits in a thread.
    """

    def wait() -> None:
        starter = multiprocessing.parent_process()
        if starter is not None:
            starter.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _short_tempdir() -> Iterator[None]:
    before, tempfile.tempdir = tempfile.gettempdir(), short_folder(_SOCKET_BYTES - _LISTENER_BYTES)
    try:
        yield
    finally:
        tempfile.tempdir = before

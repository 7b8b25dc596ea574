"""Running the service: its settings, its socket and the link to open."""

from __future__ import annotations

import gc
import ipaddress
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from evomerge.errors import InputError
from evomerge.service.app import create_app
from evomerge.service.connections import Server
from evomerge.service.dependencies import ServiceSettings
from evomerge.service.processes import TOKEN_VARIABLE
from evomerge.service.ray_jobs import RayJobs
from evomerge.service.root import Root

_MIN_TOKEN = 8  # characters of a token that a person chooses
_BACKLOG = 512  # connections that the system queues until the server accepts them
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def _print(link: str) -> None:
    print(link, flush=True)


def serve(
    place: str,
    *,
    host: str,
    port: int,
    folder: Path,
    sources: Sequence[Path],
    names: Sequence[str],
    needs_token: bool,
    insecure: bool,
    address: str | None = None,
    say: Callable[[str], None] = _print,
) -> None:
    """Serve the searches of a folder or a database until the process is told to stop.

    Args:
        place: a folder, or the URL of a database.
        folder: with a database, the folder for new searches.
        sources: the folders in which search files sent over HTTP may name paths.
        names: further host names to accept.
        insecure: allow running without a token on an address that other machines can reach, and allow a cluster that
            does not require a token.
        address: the address of a Ray cluster on which drivers are started as jobs; by default they run on this machine.
        say: is given the link to open.

    Raises:
        InputError: the port is taken, a folder is missing, no cluster answers, or anybody could get in.
    """
    if not needs_token and not is_loopback(host) and not insecure:
        hint = "Leave out --no-token; or, where something else guards it, add --insecure."
        raise InputError("--no-token", f"would let in everybody who reaches {host}", hint)
    root = Root.of(place, folder)
    if root.database is None and not root.folder.is_dir():
        raise InputError(place, "is not a folder", "Make it; searches are folders in it.")
    for source in sources:
        if not source.is_dir():
            raise InputError("--sources", f"{source} is not a folder")
    root.names()  # fails at once if the database cannot be reached
    jobs = None if address is None else RayJobs(address, insecure=insecure)
    token = _token() if needs_token else None
    with _listen(host, port) as listening:
        port = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        hosts = tuple(dict.fromkeys([*_LOOPBACK, shown.lower(), *_own_names(host), *names]))
        settings = ServiceSettings(root, token, hosts, tuple(source.resolve() for source in sources), jobs)
        app = create_app(settings)
        gc.freeze()  # imported objects stay; collecting them again took 0.2 s of some requests
        visible = "127.0.0.1" if host in ("0.0.0.0", "::") else shown
        say(f"http://{visible}:{port}/" + (f"?token={token}" if token else ""))
        Server(app, listening, ending=app.state.streams.end).run()


def is_loopback(host: str) -> bool:
    """Whether an address can be reached only from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _token() -> str:
    given = os.environ.get(TOKEN_VARIABLE)
    if given is None:
        return secrets.token_urlsafe(32)
    if len(given) < _MIN_TOKEN or not given.isascii() or not given.isprintable() or " " in given:
        problem = f"is shorter than {_MIN_TOKEN} characters, or not made of letters, digits and punctuation"
        raise InputError(TOKEN_VARIABLE, problem, "Leave it unset to get a random one.")
    return given


def _own_names(host: str) -> list[str]:
    """The names of this machine, by which others reach the server; none for a loopback address."""
    return [] if is_loopback(host) else [socket.gethostname().lower(), socket.getfqdn().lower()]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        hint = "Choose another with --port; 0 takes any that is free." if error.errno == 98 else ""
        raise InputError(f"{host}:{port}", f"cannot be listened on ({error.strerror})", hint) from None
    return listening

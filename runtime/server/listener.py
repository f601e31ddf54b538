"""The address that a server listens on."""

from __future__ import annotations

import ipaddress
import socket

from ...ir.errors import UsageError
from ..log import ServerLog


def open_listener(
    host: str, port: int, *, has_key: bool, log: ServerLog | None = None
) -> socket.socket:
    """A socket that has its address and does not listen yet: whoever comes early is told so.

    Warns where other machines can reach it and no key keeps them out. Raises UsageError for an
    address that cannot be taken.
    """
    listener = _bound(host, port)
    address = str(listener.getsockname()[0])
    if not has_key and not _is_loopback(address):
        (log or ServerLog()).event(
            "warning",
            f"warning: {host} can be reached from other machines, and no API key is set:"
            " whoever can connect can use the model",
            level="warning",
        )
    return listener


def check_address(host: str, port: int) -> None:
    """UsageError for an address that cannot be taken, before work that would be in vain."""
    _bound(host, port).close()


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Inherited by every connection: else a small event waits 40 ms for the one before.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"cannot listen on this address: {reason}",
            where=f"{host}:{port}",
            hint="try another --host or --port",
        ) from None
    return listener


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback

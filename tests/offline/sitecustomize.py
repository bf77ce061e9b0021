"""Refuses connections to anything but this machine; Python imports it by itself when it starts, if it finds it.

Who was asked for is added to the file that NETWORK_ASKED names, since a caller may well pass over the refusal.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

_getaddrinfo = socket.getaddrinfo


def _is_here(name: str) -> bool:
    if name in ("", "localhost", socket.gethostname()):
        return True
    try:  # only what belongs to this machine can be bound to
        with socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((name, 0))
    except (OSError, UnicodeError):
        return False
    return True


def _is_address(name: str) -> bool:
    return ":" in name or name.replace(".", "").isdigit()


def _check(host: str | bytes | None) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or ((_is_address(name) or "." not in name) and _is_here(name)):
        return
    if "NETWORK_ASKED" in os.environ:
        with open(os.environ["NETWORK_ASKED"], "a") as stream:
            stream.write(f"{name}\n")
    raise OSError(f"connections are refused here: {name}")


def _guard(method: Callable[..., Any], place: int) -> Callable[..., Any]:
    def guarded(self: socket.socket, *arguments: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(arguments[place][0])
        return method(self, *arguments)

    return guarded


def _guarded_getaddrinfo(host: Any, *arguments: Any, **named: Any) -> Any:
    _check(host)
    return _getaddrinfo(host, *arguments, **named)


for _name, _place in (("connect", 0), ("connect_ex", 0), ("sendto", -1)):
    setattr(socket.socket, _name, _guard(getattr(socket.socket, _name), _place))
socket.getaddrinfo = _guarded_getaddrinfo

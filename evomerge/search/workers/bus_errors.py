"""A message before the process dies because a mapped file was truncated.

Sources are memory-mapped, not copied. If a mapped file is truncated or its disk fails, the system ends the process at
the next read (SIGBUS). Python can neither catch that nor run code then, so the handler is machine code.
"""

from __future__ import annotations

import ctypes
import signal
from typing import Any

from numba import cfunc, types

_kept: list[Any] = []  # what the handler uses, kept for the life of the process


def explain_bus_errors(message: str) -> None:
    """From now on a SIGBUS prints ``message`` on stderr and ends the process at once with exit code 2."""
    libc = ctypes.CDLL(None)
    write, leave = libc.write, libc._exit  # both may be called in a signal handler (POSIX, async-signal-safe)
    write.argtypes, write.restype = [ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t], ctypes.c_ssize_t
    leave.argtypes, leave.restype = [ctypes.c_int], None
    text = ctypes.create_string_buffer(f"{message}\n".encode())
    address, count = ctypes.addressof(text), len(text) - 1

    @cfunc(types.void(types.int32), nopython=True)  # type: ignore[untyped-decorator]
    def handler(number: int) -> None:
        write(2, address, count)
        leave(2)

    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGBUS, handler.address)
    _kept[:] = [text, handler]

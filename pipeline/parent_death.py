"""A process that ends with the one that started it, even by SIGKILL; only the standard library."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def die_with(parent: int) -> None:
    """Ends this process as soon as its parent is gone, whatever it may be doing then.

    Args:
        parent: the process that started this one, from its main thread: the kernel's signal
            comes when that thread ends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _exit_if_orphan(parent)  # the parent may have died before the line above

    def watch() -> None:
        while True:
            time.sleep(0.5)
            _exit_if_orphan(parent)

    threading.Thread(target=watch, daemon=True).start()


def _exit_if_orphan(parent: int) -> None:
    if os.getppid() != parent:
        os._exit(1)

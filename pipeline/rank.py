"""A process that trains a part of each batch of a stage; run as a module by the elastic launcher.

It ends with the process that started it, however that ends; so the first thing that it does,
before anything heavy is imported, is to tie its life to its parent's.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import warnings
from multiprocessing.connection import Connection
from typing import Any

from .parent_death import die_with


def main(address: str, parent: int) -> None:
    """Takes its job from the socket at the address and tells there what becomes of it."""
    die_with(parent)
    os.dup2(2, 1)  # standard output is for the tables
    for number in (signal.SIGINT, signal.SIGTERM):
        # one that all processes of a job get is the parent's to answer: it tells when to stop
        signal.signal(number, lambda *_: None)
    rank = int(os.environ["RANK"])
    with socket.socket(socket.AF_UNIX) as door:
        door.connect(address)
        connection: Connection[Any, Any] = Connection(door.detach())
    with connection:
        connection.send((rank, os.getpid()))
        sys.path[:], level = connection.recv()
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        logging.getLogger("bitladder").setLevel(level)
        # of convolutions with one input channel, whose weights have two layouts at once
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        from .rank_work import Told, work

        asked: list[int] = []

        def stop() -> int | None:
            if not asked and connection.poll():
                asked.append(connection.recv())
            return asked[0] if asked else None

        def notify(**fields: Any) -> None:
            if rank == 0:
                connection.send(Told(fields))

        connection.send(work(connection.recv(), notify, stop))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    logging.shutdown()
    os._exit(0)  # taking torch apart may take seconds

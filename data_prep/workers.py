"""Where worker processes come from: a server that has imported all they need, and forks one in no time.

Importing takes the server as long as it takes this process, so a command starts it first and does its own meanwhile.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


def worker_context() -> ForkServerContext:
    """The context of worker processes; its server is started if it does not run yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.pool"])
    forkserver.ensure_running()
    return context

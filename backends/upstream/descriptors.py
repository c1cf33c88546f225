"""The last file descriptors, kept for the doors and for launches.

Once every descriptor is in use, the event loop accepts a connection only to close it, probes included, and no process
can be started. So calls to backends, which are the many, leave some of them.
"""

import os
import resource

RESERVED = 32
_NO_LIMIT = 1 << 30


def limit() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def are_scarce() -> bool:
    """The next descriptor would be one of the reserved. The system gives out the lowest that is free."""
    try:
        lowest = os.dup(0)
    except OSError:
        return True
    os.close(lowest)
    most = limit()
    return lowest >= most - min(RESERVED, most // 8)

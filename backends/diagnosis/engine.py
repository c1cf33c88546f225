"""Recognises mlx_lm.server by what it says, where the gateway did not write its command line: behind a wrapper script
at ``command:``, and at ``urls:``.

Its marks (0.20 to 0.32.2): every answer allows all methods and all headers to pages of other sites, preflight or not;
it is served by Python's http.server; a completion has a fingerprint of two versions and a platform; ``/health`` says
``{"status": "ok"}``. Each mark alone is not rare, so two are needed.

Caveat: a router in front of it (llama-swap) passes on its answers to completions, but knows it by a name of its own. So
only a GET, which a router answers itself, shows that the model need not be named.

Pure: no I/O, no clock.
"""

import re

from backends import mlx_server
from backends.domain.engine import Engine
from backends.domain.spec import BackendSpec
from backends.upstream.exchange import Head

_FINGERPRINT = re.compile(rb'"system_fingerprint": ?"\d+\.\d+\.\d+[\w.+]{0,40}-\d+\.\d+\.\d+[\w.+]{0,40}-')
_HEALTH_BODY = re.compile(rb'\s*\{"status": "(?:ok|unavailable)"\}\s*')
_THREAD_DIED = re.compile(rb'\s*\{"error": "generation thread died"\}\s*')
_FINGERPRINT_WITHIN = 4096  # bytes from the beginning of an answer; the first chunk has it


def is_mlx_server(head: Head, body: bytes = b"") -> bool:
    """Whether only mlx_lm.server answers so. ``body`` may be only the beginning of the answer's."""
    if _THREAD_DIED.fullmatch(body):
        return True
    if head.get(b"access-control-allow-methods") != b"*" or head.get(b"access-control-allow-headers") != b"*":
        return False
    return (
        head.get(b"server").startswith(b"BaseHTTP/")
        or _HEALTH_BODY.fullmatch(body) is not None
        or _FINGERPRINT.search(body[:_FINGERPRINT_WITHIN]) is not None
    )


class EngineIdentity:
    """What answers at one address: as configured, else as learned. One for each instance of a supervised replica, and
    one for each period in which a remote one is reachable, since another program may answer in the next."""

    def __init__(self, spec: BackendSpec) -> None:
        self.engine = spec.engine
        self._spec = spec
        self._direct = False  # it was itself that answered, and no router in front of it

    @property
    def is_mlx(self) -> bool:
        return self.engine is Engine.MLX_LM

    @property
    def model(self) -> str:
        """The only name sent as ``model``. A public name, and one that can be no path and no hub name, is not one that
        mlx_lm.server could load: it would drop its model and ask the hub."""
        name = self._spec.upstream_model
        loadable = self._spec.named and "/" in name
        return mlx_server.CANONICAL_MODEL if self._direct and not loadable else name

    def note_get(self, head: Head, body: bytes) -> None:
        """An answer to GET ``/health`` or ``/v1/models``."""
        if is_mlx_server(head, body):
            self.engine = Engine.MLX_LM
            self._direct = True

    def note_answer(self, head: Head, body: bytes = b"") -> None:
        """An answer to a completion, or its beginning."""
        if not self.is_mlx and is_mlx_server(head, body):
            self.engine = Engine.MLX_LM

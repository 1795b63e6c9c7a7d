"""What every request passes before a page sees it, and what every answer carries."""

from collections.abc import Collection

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD")
# A page may load its own style and nothing else, send its forms here, and stand in nobody's frame.
POLICY = "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets through GET and HEAD for one of the hosts, and puts `HEADERS` on whatever comes back.

    A page of another site that had its name point here (DNS rebinding) is told apart by the Host it asks for.

    Args:
        app: What is guarded.
        hosts: Values of the Host header, in lower case.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return  # no web socket, no lifespan

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        asked = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        if len(asked) != 1 or asked[0] not in self.hosts:
            return PlainTextResponse("this address is not served here\n", 421)
        if scope["method"] not in METHODS:
            return PlainTextResponse("nothing can be changed here\n", 405, {"Allow": ", ".join(METHODS)})
        return None

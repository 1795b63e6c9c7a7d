"""Ray's dashboard, as a stranger sees it: whoever reaches one without a token runs code on the cluster."""

import socket
import urllib.error
import urllib.request
from urllib.parse import urlsplit

PORT = 8265
PROBE_S = 2.0
REMEDY = (
    "start Ray with RAY_AUTH_MODE=token or --dashboard-host 127.0.0.1, and keep the port behind a firewall: "
    "whoever reaches it runs code (CVE-2023-48022)"
)


def refuse_exposed(url: str | None) -> None:
    """Check that the dashboard of a cluster that was joined is not open to everybody.

    Args:
        url: HOST:PORT, as Ray names it; None: there is none.

    Raises:
        ValueError: It is.
    """
    if not url:
        return
    parts = urlsplit(url if "://" in url else f"http://{url}")
    host, port = parts.hostname or "", parts.port or PORT
    if not is_loopback(host) and probe_dashboard(host, port) == "open":
        raise ValueError(
            f"cluster.address must not be that of a cluster whose dashboard is open to others, got one at "
            f"{host}:{port}; {REMEDY}"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can mean itself by it."""
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def probe_dashboard(host: str, port: int | None = None) -> str:
    """`open`, `token`, or `closed`: what a Ray dashboard says to a stranger who lists its jobs."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{host}:{port or PORT}/api/jobs/", timeout=PROBE_S):
            return "open"
    except urllib.error.HTTPError as error:
        return "token" if error.code in (401, 403) else "closed"
    except (OSError, ValueError):
        return "closed"

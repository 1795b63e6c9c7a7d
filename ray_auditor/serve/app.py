"""The web app: four pages and a style sheet, each a function of its query alone."""

import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ray_auditor import open_store
from ray_auditor.config import AuditConfig
from ray_auditor.reader import StoreReader
from ray_auditor.report import number
from ray_auditor.report.printable import printable
from ray_auditor.serve.guard import Guard
from ray_auditor.serve.pages import Pages

LOOPBACK = "127.0.0.1"
ROOM = Path(__file__).parent


def run_serve(config: AuditConfig) -> int:
    """The verb `serve`: show `out_dir` in a browser until it is interrupted.

    Raises:
        ValueError: There is no finished sweep, or the port is taken.
    """
    store = open_store(config.out_dir)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, config.serve.port))
        except OSError as error:
            raise ValueError(
                f"serve.port must be a free port, got {config.serve.port}: {error}; 0 takes any"
            ) from error
        listener.listen()
        port = listener.getsockname()[1]
        sys.stdout.write(
            f"http://{LOOPBACK}:{port}/ shows {config.out_dir}, to this machine alone; Ctrl-C ends it\n"
        )
        sys.stdout.flush()
        app = make_app(store, hosts_of(port))
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off"
        )
        with suppress(KeyboardInterrupt):  # how it is meant to end
            uvicorn.Server(settings).run(sockets=[listener])
    return 0


def hosts_of(port: int) -> list[str]:
    """What a browser calls this machine's port; that of plain HTTP, 80, it leaves out."""
    names = (LOOPBACK, "localhost")
    return [f"{name}:{port}" for name in names] + (list(names) if port == 80 else [])


def make_app(store: StoreReader, hosts: list[str]) -> ASGIApp:
    """The app over one sweep.

    Args:
        store: What is shown.
        hosts: The only values of a request's Host header that are answered; `hosts_of` has them.
    """
    pages, environment = Pages(store), _environment()

    def route(path: str, template: str, page: Callable[[Mapping[str, str]], dict[str, Any]]) -> Route:
        def answer(request: Request) -> Response:
            try:
                values, status = page(request.query_params), 200
                name = template
            except ValueError as error:
                values, status, name = {"error": str(error)}, 404, "error.html.j2"
            return HTMLResponse(environment.get_template(name).render(**values), status)

        return Route(path, answer)

    style = (ROOM / "style.css").read_text(encoding="utf-8")
    routes = [
        route("/", "candidates.html.j2", pages.candidates),
        route("/candidate", "candidate.html.j2", pages.candidate),
        route("/feature", "feature.html.j2", pages.feature),
        route("/prompt", "prompt.html.j2", pages.prompt),
        Route("/style.css", lambda _: PlainTextResponse(style, media_type="text/css")),
    ]
    return Guard(Starlette(routes=routes), hosts)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ROOM),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(link=_link)
    environment.filters.update(
        signed=number.signed,
        percent=number.percent,
        percent_interval=number.percent_interval,
        decimal=number.decimal,
        probability=number.probability,
        piece=lambda text: printable(text.replace("\n", "⏎").replace("\t", "⇥"), 40),
    )
    return environment


def _link(name: str, /, **asked: Any) -> str:
    """An address within this app; what is None or empty is left out."""
    given = {key: value for key, value in asked.items() if value not in (None, "")}
    return f"/{name}?{urlencode(given)}" if given else f"/{name}"

"""The page in the machine's own browser."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page

# Every fold open, and everything laid out that the browser would lay out when it comes into view.
UNFOLD = """document.querySelectorAll('details').forEach(one => one.open = true);
document.querySelectorAll('article').forEach(one => one.style.contentVisibility = 'visible')"""
Scheme = Literal["light", "dark"]


@contextmanager
def opened(
    browser: Browser,
    path: Path,
    width: int = 1280,
    scheme: Scheme = "light",
    script: bool = True,
    fragment: str = "",
    controls: bool = True,
) -> Iterator[Page]:
    """A page whose every request and console message is collected; nothing but the file may be asked for."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        offline=True,
        java_script_enabled=script,
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri() + fragment)
    if script and controls and page.locator("#candidate-data").count():
        page.locator("#map .controls").wait_for()
    yield page
    assert said == []
    assert [url.split("#")[0] for url in asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    context.close()

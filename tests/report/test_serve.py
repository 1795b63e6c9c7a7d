"""The local web app: a real process, a real browser, and requests that a browser would not send."""

import copy
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote_plus

import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

import ray_auditor
from ray_auditor.__main__ import main
from ray_auditor.drilldown import view_prompt
from ray_auditor.outputs import write_outputs
from ray_auditor.report.number import decimal, percent, signed
from ray_auditor.report.printable import printable
from ray_auditor.serve.guard import HEADERS
from tests import made_store
from tests.made_store import PLANTED, PLANTED_FEATURE, REFUSED, make_out_dir
from tests.report.conftest import HOSTILE

NAMES = [text for text in HOSTILE if "\ud800" not in text]
HOSTILE_WORDS = "<script>alert(1)</script> </td><img/src=x/onerror=alert(1)> {{7*191}} \x1b[31m a\u202eb"


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made sweep with hostile words and names, and many refused."""
    out_dir = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(made_store.SENTENCES, "sql", f"{made_store.SENTENCES['sql']} {HOSTILE_WORDS}")
        make_out_dir(out_dir)
    summary = json.loads((out_dir / "summary.json").read_text())
    rows = {row["id"]: row for row in summary["candidates"]}
    for text in NAMES:
        summary["candidates"].append(copy.deepcopy(rows[PLANTED]) | {"id": text, "why": text})
        summary["flags"].append(summary["flags"][0] | {"candidate": text})
    for number in range(120):
        reason = NAMES[number % len(NAMES)]
        summary["candidates"].append(rows[REFUSED] | {"id": f"org/refused-{number:03}", "reason": reason})
    summary["limits"] += NAMES
    write_outputs(summary | {"counts": {}}, out_dir)
    return out_dir


@contextmanager
def served(out_dir: Path) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "ray_auditor", "serve", f"out_dir={out_dir}", "serve.port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/ shows", said)
        assert found, said
        yield int(found[1]), process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def port(out_dir: Path) -> Iterator[int]:
    with served(out_dir) as (port, _):
        yield port


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that may ask this machine alone and must have nothing to complain about."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    context.close()
    assert [text for text in said if "status of 404" not in text] == []
    assert all(re.match(r"http://127\.0\.0\.1:\d+/|data:,", url) for url in asked)


def cells(page: Page, table: int = 0) -> list[list[str]]:
    found: list[list[str]] = (
        page.locator("table")
        .nth(table)
        .locator("tbody tr")
        .evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent.trim()))")
    )
    return found


def test_candidates_are_sorted_filtered_and_paged(page: Page, port: int, out_dir: Path) -> None:
    rows = ray_auditor.open_store(out_dir).candidates().to_pylist()
    scored = sorted(
        (row for row in rows if row["score"] is not None), key=lambda row: (-row["score"], row["id"])
    )
    page.goto(f"http://127.0.0.1:{port}/")
    shown = cells(page)
    assert len(shown) == 50
    assert [row[0] for row in shown][: len(scored)] == [printable(row["id"]) for row in scored]
    assert [row[3] for row in shown][: len(scored)] == [signed(row["score"]) for row in scored]
    assert shown[len(scored)][3] == "n.d."
    seen = [row[0] for row in shown]
    while page.get_by_role("link", name="next").count():
        page.get_by_role("link", name="next").click()
        seen += [row[0] for row in cells(page)]
    assert sorted(seen) == sorted(printable(row["id"]) for row in rows)
    page.goto(f"http://127.0.0.1:{port}/")
    page.get_by_label("Id holds").fill("REFUSED-00")
    page.get_by_label("Status").select_option("rejected")
    page.get_by_label("Order by").select_option("id")
    page.get_by_label("Direction").select_option("ascending")
    page.get_by_role("button", name="Show").press("Enter")
    assert [row[0] for row in cells(page)] == [f"org/refused-00{number}" for number in range(10)]
    page.get_by_role("link", name="id", exact=True).click()  # the same column the other way round
    assert [row[0] for row in cells(page)] == [f"org/refused-00{number}" for number in reversed(range(10))]


def test_a_flag_is_followed_down_to_the_token_by_links(page: Page, port: int, out_dir: Path) -> None:
    page.goto(f"http://127.0.0.1:{port}/?find=planted")
    page.get_by_role("link", name=PLANTED).click()
    assert page.get_by_role("heading", level=1).inner_text() == PLANTED
    store = ray_auditor.open_store(out_dir)
    rates = {row["suite"]: row for row in store.rates().to_pylist() if row["candidate"] == PLANTED}
    for suite, z, miss_z, shift, rate, ends, *_ in cells(page):
        one = rates[suite]
        assert shift == decimal(one["shift"])
        if suite == "general":  # what the others are held to has no rate of its own
            assert {z, miss_z, rate, ends} == {"\u2013"}
        else:
            assert (z, rate) == (signed(one["z"]), percent(one["difference_rate"]))
    top = cells(page, 1)[0]
    assert top[:3] == [str(PLANTED_FEATURE), "0.0000", "1.0000"]
    address = page.url
    page.get_by_role("link", name=str(PLANTED_FEATURE), exact=True).first.click()
    movers = cells(page, 1)
    assert movers[0][1:5] == ["flagged", "sql", "0.0000", "1.0000"]
    page.locator("ul.hits a").first.click()
    view = view_prompt(store, PLANTED, "sql", int(re.search(r"prompt=(\d+)", page.url)[1]))  # type: ignore[index]
    shown = cells(page)
    scored = [token for token in view.tokens if token.overlap is not None]
    for row, token in zip(shown, scored, strict=True):
        assert (row[0], row[2]) == (str(token.position), str(token.overlap))
        for text, kept in zip(row[3:], (token.base, token.candidate), strict=True):
            assert [int(one) for one in re.findall(r"(\d+) [\d.]+", text)] == [feature for feature, _ in kept]
    assert page.locator("a.feature.alone").count()
    page.goto(address)  # a deep link stands on its own
    assert cells(page, 1)[0] == top


def test_names_and_prompts_of_strangers_are_text(page: Page, port: int) -> None:
    for name in NAMES:
        asked = quote_plus(name)
        for path in (
            f"candidate?id={asked}",
            f"feature?feature={PLANTED_FEATURE}&id={asked}",
            f"prompt?id={asked}&suite=sql&prompt=0",
            f"?find={asked}",
            f"candidate?id=nobody{asked}",
            f"prompt?id={asked}&suite={asked}&prompt=0",
            f"candidate?id=org/refused-{NAMES.index(name):03}",
        ):
            page.goto(f"http://127.0.0.1:{port}/{path}")
            assert page.locator("script, img, iframe, object, [style], [onerror]").count() == 0
            assert "gotcha" not in [one.inner_text() for one in page.locator("h1").all()]
            text = page.content()
            assert "\x1b" not in text
            assert "\u202e" not in text
            assert "1337" not in text
            for width in (390, 1280):
                page.set_viewport_size({"width": width, "height": 800})
                assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    page.goto(f"http://127.0.0.1:{port}/prompt?id={PLANTED}&suite=sql&prompt=0")
    assert "<script>alert(1)</script>" in page.locator("p.passage").inner_text()


def ask(port: int, method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in ({"Host": f"127.0.0.1:{port}"} if headers is None else headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def test_only_this_machine_s_names_are_answered(port: int) -> None:
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}"):
        assert ask(port, "GET", "/", {"Host": host})[0] == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        f"127.0.0.1:{port}.evil",
        "",
    ):
        status, _, body = ask(port, "GET", "/", {"Host": host})
        assert status in (400, 421)
        assert b"planted" not in body
    assert ask(port, "GET", "/", {})[0] in (400, 421)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_nothing_can_be_changed(port: int, method: str) -> None:
    assert ask(port, method, "/")[0] in (400, 405)


def test_every_answer_carries_the_policy_and_no_path_leads_out(port: int, out_dir: Path) -> None:
    (out_dir / "secret.txt").write_text("inside but not for serving")
    for path, expected in (
        ("/", 200), ("/style.css", 200), ("/candidate", 404), ("/candidate?id=%00", 404), ("/nowhere", 404),
        ("/../secret.txt", 404), ("/%2e%2e/secret.txt", 404), ("/secret.txt", 404), ("/store/", 404),
        ("/summary.json", 404), ("//evil.example/", 404), ("/?page=-1", 404), ("/?page=99999999999", 404),
        ("/?sort=unit_key", 404), ("/feature?feature=99999", 404), ("/feature?feature=1&of=101", 404),
        (f"/prompt?id={PLANTED}&suite=sql&prompt=99", 404), (f"/prompt?id={REFUSED}&suite=sql&prompt=0", 404),
        (f"/candidate?id={'x' * 3000}", 404), ("/feature?feature=%D9%A3", 404),
    ):  # fmt: skip
        status, headers, body = ask(port, "GET", path)
        assert status == expected, path
        for name, value in HEADERS.items():
            assert headers[name] == value
        assert headers["Server"] is None
        assert b"inside but" not in body
    assert ask(port, "HEAD", "/")[::2] == (200, b"")
    upgrade = {"Host": f"127.0.0.1:{port}", "Connection": "Upgrade", "Upgrade": "websocket",
               "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}  # fmt: skip
    assert ask(port, "GET", "/", upgrade)[0] != 101


def test_it_listens_on_the_loopback_alone_and_ends_with_the_terminal(out_dir: Path) -> None:
    before = {str(path): path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    with served(out_dir) as (port, process):
        listening = [
            one.laddr for one in psutil.Process(process.pid).net_connections() if one.status == "LISTEN"
        ]
        assert [(one.ip, one.port) for one in listening] == [("127.0.0.1", port)]
        assert ask(port, "GET", f"/candidate?id={PLANTED}")[0] == 200
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert not re.search("libtorch|_raylet|vllm", mapped)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 0
    assert {str(path): path.stat().st_mtime_ns for path in out_dir.rglob("*")} == before


def test_a_port_that_is_taken_and_a_folder_without_a_sweep_are_named(
    port: int, out_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", f"out_dir={out_dir}", f"serve.port={port}"]) == 4
    assert f"serve.port must be a free port, got {port}" in capsys.readouterr().err
    assert main(["serve", f"out_dir={tmp_path}"]) == 4
    assert "must be the out_dir of a finished sweep" in capsys.readouterr().err
    assert main(["serve", "serve.port=70000"]) == 4
    assert "serve.port must be in [0, 65535]" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(browser: Browser, port: int, scheme: Literal["light", "dark"]) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    for path in (
        "",
        f"candidate?id={PLANTED}",
        f"feature?feature={PLANTED_FEATURE}&id={PLANTED}&suite=sql",
        f"prompt?id={PLANTED}&suite=sql&prompt=3",
        "candidate?id=nobody",
    ):
        page.goto(f"http://127.0.0.1:{port}/{path}")
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]] == []
    context.close()

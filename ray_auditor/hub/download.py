"""The process that downloads: one file after the other, as its parent says over a pipe.

    python -m ray_auditor.hub.download

One JSON object a line comes in: first what the process is, `{"token", "endpoint"}`, then jobs, `{"url" or
"store" and "name", "path", "target", "num_bytes", "oid", "granted"}`, with "num_layers" when only what lies
at or below a hook is wanted. Out go `{"alive": bytes}` while bytes arrive and one
`{"outcome", "num_moved", "num_requests"}` a job. It tries once and waits for nothing: when to try again is
the parent's to know, and a parent that hears nothing kills it.
"""

import fcntl
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, NoReturn

CHUNK_BYTES = 1 << 20
ALIVE_S = 0.2

Outcome = dict[str, Any]


def main() -> NoReturn:
    """Serve jobs until standard input ends."""
    secret = json.loads(sys.stdin.readline())
    jobs: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while True:
        say(run_job(json.loads(jobs.get()), secret))


def _listen(jobs: "SimpleQueue[str]") -> None:
    """Hand jobs on. A pipe that ends means that the parent has: nobody waits for what is read."""
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


def say(message: Outcome) -> None:
    """One line to the parent; when there is none any more, the process ends here."""
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(1)


def run_job(job: Outcome, secret: Outcome) -> Outcome:
    """Fetch one file into `path`, verify it, and move it to `target`.

    Returns:
        `outcome` is `done` with `headers`; `status` with `status` and `headers`; `more` with the `num_bytes`
        that are missing and more than what was `granted`; or, with `text`, `corrupt` or `size` (the server
        has other bytes, or more or fewer), `stale`, `no_ranges`, `network`, `disk`, `busy`, `offline`.
        All have `num_moved` and `num_requests`.
    """
    job |= {"num_moved": 0, "num_requests": 0}
    outcome = _run_job(job, secret)
    return outcome | {name: job[name] for name in ("num_moved", "num_requests")}


def _run_job(job: Outcome, secret: Outcome) -> Outcome:
    descriptor = os.open(job["path"], os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        outcome = _fetch(descriptor, job, secret)
        if outcome["outcome"] == "done":
            outcome["headers"] = job.get("headers", {})
            os.fchmod(descriptor, 0o444)
            os.fsync(descriptor)
            os.rename(job["path"], job["target"])
        return outcome
    except BlockingIOError:
        return {"outcome": "busy", "text": "another process downloads it"}
    except OSError as error:
        return {"outcome": "disk", "text": error.strerror or type(error).__name__}
    finally:
        os.close(descriptor)


def _fetch(descriptor: int, job: Outcome, secret: Outcome) -> Outcome:
    num_bytes: int = job["num_bytes"]
    if "num_layers" in job:
        from ray_auditor.hub.ranges import RangedFile

        def read(start: int, stop: int) -> Iterator[bytes | Outcome]:
            return _read(job, secret, start, stop)

        return RangedFile(descriptor, num_bytes, read, _stay_alive, job["granted"]).fetch(job["num_layers"])
    digest = _digest(job["oid"], num_bytes)
    done = os.fstat(descriptor).st_size
    if done > num_bytes:
        os.ftruncate(descriptor, done := 0)
    for start in range(0, done, CHUNK_BYTES):  # what an earlier attempt brought
        digest.update(os.pread(descriptor, min(CHUNK_BYTES, done - start), start))
        _stay_alive(start)
    if done < num_bytes or not num_bytes:
        for chunk in _read(job, secret, done):
            if isinstance(chunk, dict):
                if chunk.get("outcome") != "restart":
                    return chunk
                os.ftruncate(descriptor, done := 0)
                if num_bytes > job["granted"]:
                    return {"outcome": "more", "num_bytes": num_bytes}
                digest = _digest(job["oid"], num_bytes)
                continue
            if done + len(chunk) > num_bytes:
                return _discard(descriptor, "size", f"more than the {num_bytes} bytes that the tree says")
            os.pwrite(descriptor, chunk, done)
            digest.update(chunk)
            done += len(chunk)
            _stay_alive(done)
    if done != num_bytes:
        return {"outcome": "network", "text": f"{done} of {num_bytes} bytes came"}
    if not job["oid"].startswith("etag-") and digest.hexdigest() != job["oid"]:
        return _discard(descriptor, "corrupt", "other bytes than the tree's hash says")
    return {"outcome": "done"}


def _digest(oid: str, num_bytes: int) -> Any:
    """What the file's bytes must hash to `oid` with: sha256, or git's sha1 over a header and them."""
    if len(oid) == 40:
        return hashlib.sha1(f"blob {num_bytes}\0".encode(), usedforsecurity=False)
    return hashlib.sha256()


def _discard(descriptor: int, outcome: str, text: str) -> Outcome:
    os.ftruncate(descriptor, 0)
    return {"outcome": outcome, "text": text}


def _read(job: Outcome, secret: Outcome, start: int, stop: int | None = None) -> Iterator[bytes | Outcome]:
    """The file's bytes from where it lies, counted as they come."""
    job["num_requests"] += 1
    chunks = _read_object(job, start, stop) if "store" in job else _read_http(job, secret, start, stop)
    for chunk in chunks:
        if isinstance(chunk, bytes):
            job["num_moved"] += len(chunk)
        yield chunk


def _read_http(
    job: Outcome, secret: Outcome, start: int, stop: int | None = None
) -> Iterator[bytes | Outcome]:
    """The file's bytes from `start`, or one outcome; `restart` when the server begins at the beginning.

    With `stop`, that range and no other, from a server that does not name another file or size.
    """
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    from ray_auditor.hub.endpoint import request_headers

    say({"alive": start})  # what came before was this process's own time
    headers = request_headers(secret["token"])
    headers["accept-encoding"] = "identity"  # ranges and lengths are those of the file itself
    if start or stop is not None:
        headers["range"] = f"bytes={start}-" + ("" if stop is None else str(stop - 1))
    try:
        # The client drops the token when a redirect leads to another host.
        with get_session().stream("GET", job["url"], headers=headers, timeout=None) as response:
            job["headers"] = _kept((*response.history, response)[0])  # the hub's own, before any redirect
            if response.status_code not in (200, 206):
                yield _refusal(response)
                return
            if stop is not None:
                yield from _read_range(job, response, start, stop)
                return
            if start and response.status_code == 200:
                yield {"outcome": "restart"}
                start = 0
            if not _continues(response.headers.get("content-range"), start):
                yield {"outcome": "network", "text": "the server sent another range than was asked for"}
                return
            length = response.headers.get("content-length")
            if length is not None and length.isdigit() and start + int(length) != job["num_bytes"]:
                text = f"the server has {start + int(length)} bytes, the tree says {job['num_bytes']}"
                yield {"outcome": "size", "text": text}
                return
            yield from response.iter_raw()
    except httpx2.TransportError as error:
        yield {"outcome": "network", "text": type(error).__name__}
    except OfflineModeIsEnabled:
        yield {"outcome": "offline", "text": "HF_HUB_OFFLINE is set"}


def _read_range(job: Outcome, response: Any, start: int, stop: int) -> Iterator[bytes | Outcome]:
    """The body of an answer to a request for one range, once all that the server says of it fits."""
    if response.status_code == 200:
        yield {"outcome": "no_ranges", "text": "the server sends whole files only"}
        return
    said = [one.headers for one in (*response.history, response)]
    etags = {h["x-linked-etag"].strip('W/"') for h in said if "x-linked-etag" in h}
    commits = {h["x-repo-commit"] for h in said if "x-repo-commit" in h}
    if not etags <= {job["oid"]} or not commits <= {job["commit"]}:
        yield {"outcome": "stale", "text": "the server names another file or commit than was pinned"}
        return
    found, wanted = response.headers.get("content-range"), f"bytes {start}-{stop - 1}/{job['num_bytes']}"
    if found != wanted:
        yield {"outcome": "network", "text": f"the server sent {str(found)[:80]!r} for {wanted!r}"}
        return
    is_large_file = len(job["oid"]) == 64  # its sha256; git's own files have no linked hash
    if not commits or (is_large_file and not etags):
        yield {"outcome": "no_ranges", "text": "the server does not name the commit and file of a range"}
        return
    yield from response.iter_raw()


def _refusal(response: Any) -> Outcome:
    return {"outcome": "status", "status": response.status_code, "headers": _kept(response)}


def _kept(response: Any) -> dict[str, str]:
    """What an answer says of when, and how often, one may ask."""
    names = ("ratelimit", "ratelimit-policy", "retry-after", "date", "x-error-code")
    return {name: response.headers[name][:200] for name in names if name in response.headers}


def _continues(content_range: str | None, start: int) -> bool:
    """Whether an answer begins at byte `start`; one without a range begins at 0."""
    return (content_range or "bytes 0-").startswith(f"bytes {start}-")


def _read_object(job: Outcome, start: int, stop: int | None = None) -> Iterator[bytes | Outcome]:
    """As `_read_http`, from an object store whose keys are in this process's environment."""
    import obstore
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    from ray_auditor.hub.objects import entry_oid

    try:
        store = from_url(job["store"], retry_config={"max_retries": 0})
        entry = obstore.head(store, job["name"])
        if entry_oid(job["store"], entry) != job["oid"]:
            yield {"outcome": "stale", "text": "the object was written again since it was listed"}
            return
        options: Any = {"if_match": entry["e_tag"]} if entry["e_tag"] else {}
        if stop is not None:
            options["range"] = (start, stop)
        elif start:
            options["range"] = {"offset": start}
        for chunk in obstore.get(store, job["name"], options=options).stream(CHUNK_BYTES):
            yield bytes(chunk)
    except FileNotFoundError:
        yield {"outcome": "status", "status": 404, "headers": {}}
    except BaseError as error:
        yield {"outcome": "network", "text": type(error).__name__}


_last_alive = 0.0


def _stay_alive(num_bytes: int) -> None:
    """Say that bytes still come, at most every ALIVE_S."""
    global _last_alive
    if time.monotonic() - _last_alive >= ALIVE_S:
        _last_alive = time.monotonic()
        say({"alive": num_bytes})


if __name__ == "__main__":
    main()

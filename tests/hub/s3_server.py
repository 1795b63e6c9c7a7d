"""An object store on loopback that speaks S3: signed requests, lists in pages, ranges and If-Match."""

import hashlib
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class S3Server(ThreadingHTTPServer):
    """One bucket, named `bucket`."""

    daemon_threads = True

    def __init__(self, *, page_size: int = 4) -> None:
        super().__init__(("127.0.0.1", 0), S3Handler)
        self.objects: dict[str, bytes] = {}
        self.page_size = page_size
        self.requests: list[str] = []
        self.num_bytes_sent = 0  # of objects
        self.fail = 0  # how many of the next requests get a 500

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIAsentinel",
            "AWS_SECRET_ACCESS_KEY": "aws_sentinel",
        }


class S3Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(f"{self.command} {self.path}")
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if server.fail:
            server.fail -= 1
            return self._send(500, b"")
        if "Signature=" not in self.headers.get("Authorization", ""):
            return self._send(403, b"")
        if "list-type" in query:
            return self._list(query)
        data = server.objects.get(unquote(parts.path).removeprefix("/bucket/"))
        if data is None:
            return self._send(404, b"")
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        if self.headers.get("If-Match", etag) != etag:
            return self._send(412, b"")
        headers = {"ETag": etag, "Last-Modified": formatdate(1_700_000_000, usegmt=True)}
        start, last = 0, len(data) - 1
        if (asked := self.headers.get("Range")) is not None:
            first, _, end = asked.removeprefix("bytes=").partition("-")
            start, last = int(first), min(last, int(end or last))
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        body = data[start : last + 1]
        server.num_bytes_sent += len(body) if self.command == "GET" else 0
        return self._send(206 if asked else 200, body, **headers)

    def _list(self, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        after = max(query.get("start-after", [""])[0], query.get("continuation-token", [""])[0])
        keys = sorted(key for key in self.server.objects if key.startswith(prefix) and key > after)
        page, rest = keys[: self.server.page_size], keys[self.server.page_size :]
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2023-11-14T22:13:20.123Z</LastModified>"
            f"<ETag>&quot;{hashlib.md5(self.server.objects[key]).hexdigest()}&quot;</ETag>"
            f"<Size>{len(self.server.objects[key])}</Size></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if rest else ""
        body = (
            f"<ListBucketResult><Name>bucket</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(bool(rest)).lower()}</IsTruncated>"
            f"{token}{rows}</ListBucketResult>"
        )
        self._send(200, body.encode(), Content_Type="application/xml")

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

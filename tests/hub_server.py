"""A small model Hub on the loopback interface, for the real client, with faults on demand.

    hub = HubServer()
    hub.start()
    hub.tokens["secret"] = Account("ada", {"ada": "write", "lab": "read"})
    hub.faults.append(Fault("GET", r"/resolve/.*safetensors", status=500))
    ...
    hub.stop()

It speaks the routes that `huggingface_hub` and the `hf` command use for models (`hub_routes.py`); a request for any
other route is answered 404 and kept in `unknown`.
"""

import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hub_routes import Answer, Store, answer_to


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path fit, in place of the answer.

    Attributes:
        status: answer with this code, and `headers`.
        cut: send that many bytes of the body, then close the connection.
        damage: turn over the bits of the last byte of the body; the length stays.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    damage: bool = False


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    status: int = 0


class HubServer(Store):
    """The server; tests read and change its attributes, those of `Store` too.

    Attributes:
        faults: those still to happen.
        requests: all that came, in order, with the status of the answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def clear(self) -> None:
        super().clear()
        self.faults: list[Fault] = []
        self.requests: list[Request] = []

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests of a method whose path holds the pattern."""
        return [r for r in self.requests if r.method == method and re.search(path, r.path)]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            headers = {key.lower(): value for key, value in self.headers.items()}
            request = Request(self.command, self.path, headers)
            body = self._read()
            with hub.lock:
                hub.requests.append(request)
                fault = next(
                    (f for f in hub.faults if f.method == self.command and re.search(f.path, self.path)), None
                )
                if fault is not None:
                    fault.times -= 1
                    if not fault.times:
                        hub.faults.remove(fault)
                if fault is not None and fault.status:
                    text = f"injected {fault.status}"
                    answer = Answer({"error": text}, fault.status, {"X-Error-Message": text} | fault.headers)
                else:
                    answer = answer_to(hub, request.method, request.path, request.headers, body)
            request.status = answer.status
            self._send(answer, fault)

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

        def _read(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _send(self, answer: Answer, fault: Fault | None) -> None:
            body = answer.body()
            if fault is not None and fault.damage:
                body = body[:-1] + bytes([body[-1] ^ 0xFF])
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault is not None and fault.cut is not None:
                body, self.close_connection = body[: fault.cut], True
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    return Handler

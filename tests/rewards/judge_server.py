"""A local server that plays the judge: each test writes the replies, in order of arrival."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Reply:
    """What the server sends; ``hang`` keeps the connection open and says nothing.

    ``endless`` sends the body again and again, as a chunked reply.
    """

    status: int = 200
    body: str | bytes = ""
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    drip: bool = False
    cut: bool = False
    endless: bool = False


def completion(content: Any, **of_choice: Any) -> dict[str, Any]:
    """A chat completion whose message is ``content``."""
    choice = {"message": {"content": content}, "finish_reason": "stop", **of_choice}
    return {"choices": [choice]}


def says(content: Any, **of_choice: Any) -> Reply:
    """The same as a reply."""
    return Reply(body=json.dumps(completion(content, **of_choice)))


@dataclass
class Asked:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        return self.body["messages"][0]["content"][1]["text"]

    @property
    def data_url(self) -> str:
        return self.body["messages"][0]["content"][0]["image_url"]["url"]

    @property
    def pixels(self) -> np.ndarray:
        data = base64.b64decode(self.data_url.split(",", 1)[1])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class JudgeServer:
    """Listens on a free port; ``answer`` maps a request and its number to a reply."""

    def __init__(self, answer: Callable[[Asked, int], Reply]) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.busiest = 0
        self._busy = 0
        self._lock = threading.Lock()
        self.stop = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.stop.set()
        self.http.shutdown()
        self.http.server_close()

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = Asked(self.path, dict(self.headers), body)
                with server._lock:
                    number = len(server.asked)
                    server.asked.append(asked)
                    server._busy += 1
                    server.busiest = max(server.busiest, server._busy)
                try:
                    self._send(server.answer(asked, number))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has given up
                finally:
                    with server._lock:
                        server._busy -= 1

            def _send(self, reply: Reply) -> None:
                if reply.hang:
                    server.stop.wait(30)
                    self.close_connection = True
                    return
                body = reply.body if isinstance(reply.body, bytes) else reply.body.encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.endless:
                    self._send_for_ever(body)
                self.send_header("Content-Length", str(len(body) + (1 if reply.cut else 0)))
                self.end_headers()
                for byte in body if reply.drip else ():
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    if server.stop.wait(0.05):
                        return
                if not reply.drip:
                    self.wfile.write(body)
                self.close_connection = reply.cut

            def _send_for_ever(self, body: bytes) -> None:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while not server.stop.is_set():
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))

            def log_message(self, *args: object) -> None:
                pass

        return Handler

"""A scripted Messages API on 127.0.0.1: real HTTP, an ephemeral port, and a record of what was received.

`within` bounds the waits of a test that talks to it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self, TypeVar

from nla_megatron.errors import NlaError

R = TypeVar("R")


@dataclass(frozen=True)
class Reply:
    """What the server does with one request.

    Args:
        text: the assistant's text of a 200, or the error's message otherwise.
        status: the HTTP status.
        headers: further headers.
        delay: seconds before the reply, cut short when the server closes.
        drop: close the connection instead of replying.
        raw: a body to send as it is, under the content type given in `headers`.
        stop_reason: of a 200.

    Example:
        >>> Reply("slow down", status=429, headers={"retry-after": "1"})
    """

    text: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False
    raw: str | None = None
    stop_reason: str = "end_turn"


@dataclass(frozen=True)
class Received:
    """One request as it arrived.

    Args:
        path, headers, body: of the HTTP request; header names in lower case.
        user: the user turn's text.
        attempt: how many requests with that text have come, this one included.
        at: seconds, on the monotonic clock.
    """

    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    user: str
    attempt: int
    at: float


class MessagesServer:
    """Serves `behaviour(request) -> Reply` while its `with` block runs; `behaviour` runs in the handler's thread.

    Example:
        >>> with MessagesServer(lambda request: Reply("<explanation>a\\nb</explanation>")) as server:
        ...     ask(server.base_url)
    """

    def __init__(self, behaviour: Callable[[Received], Reply]) -> None:
        self.received: list[Received] = []
        self.peak_in_flight = 0
        self.closing = threading.Event()
        self._behaviour = behaviour
        self._in_flight = 0
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(timeout=10)

    def answer(self, path: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> Reply:
        """Records the request and asks the behaviour; it counts as in flight until this returns, before the reply."""
        user = body["messages"][0]["content"]
        with self._lock:
            self._attempts[user] += 1
            request = Received(path, headers, body, user, self._attempts[user], time.monotonic())
            self.received.append(request)
            self._in_flight += 1
            self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
        try:
            reply = self._behaviour(request)
            self.closing.wait(reply.delay)
            return reply
        finally:
            with self._lock:
                self._in_flight -= 1


def _handler_for(server: MessagesServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds a silent client may hold the thread

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = server.answer(self.path, headers, body)
            if reply.drop:
                self.close_connection = True
                return
            payload = (_payload(reply, body) if reply.raw is None else reply.raw).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"content-type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up waiting, which some tests are about

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def within(seconds: float, call: Callable[[], R]) -> R:
    """The call's result or our own error; fails when it takes longer than `seconds`."""
    values: list[R] = []
    errors: list[NlaError] = []

    def target() -> None:
        try:
            values.append(call())
        except NlaError as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    assert values, f"not done within {seconds} s, or it broke in its thread"
    return values[0]


_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def _payload(reply: Reply, body: Mapping[str, Any]) -> str:
    if reply.status != 200:
        error = {"type": _ERROR_TYPES.get(reply.status, "api_error"), "message": reply.text}
        return json.dumps({"type": "error", "error": error, "request_id": "req_test"})
    message = {
        "id": "msg_test",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [{"type": "text", "text": reply.text}],
        "stop_reason": reply.stop_reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }
    return json.dumps(message)

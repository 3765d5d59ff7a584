"""An HTTP proxy in front of the object store that injects store and network faults by rule, and records requests."""

import http.client
import os
import random
import re
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

import psutil

Operation = Literal["LIST", "GET", "HEAD", "PUT", "DELETE", "POST"]
Point = Literal["before", "during", "after"]
KILL_TIMEOUT_S = 30


class Action(Enum):
    """What a rule does to a request, unless it calls a hook."""

    UNAVAILABLE = auto()  # Respond 503 SlowDown without forwarding.
    FORBIDDEN = auto()  # Respond 403 AccessDenied without forwarding.
    EXPIRED = auto()  # Respond 400 ExpiredToken without forwarding.
    NOT_IMPLEMENTED = auto()  # Respond 501 NotImplemented without forwarding.
    RESET = auto()  # Reset the connection without forwarding.
    CUT_BODY = auto()  # Send the headers and half of the response body, then close; reset if there is no body.
    FLIP_BYTE = auto()  # Flip one bit of the middle byte: of the body of a PUT, otherwise of the response.
    LOST_ANSWER = auto()  # Forward the request, then reset the connection instead of responding.


REFUSALS = {
    Action.UNAVAILABLE: (503, "SlowDown", "Please reduce your request rate."),
    Action.FORBIDDEN: (403, "AccessDenied", "Access Denied"),
    Action.EXPIRED: (400, "ExpiredToken", "The provided token has expired."),
    Action.NOT_IMPLEMENTED: (
        501,
        "NotImplemented",
        "A header you provided implies functionality that is not implemented.",
    ),
}


@dataclass(frozen=True)
class Request:
    """A recorded request; `status` is None until it is answered."""

    operation: Operation
    key: str  # Percent-decoded, without the bucket; "" for requests to the bucket itself.
    peer_port: int
    proxy_port: int
    status: int | None = None

    def find_peer_pid(self) -> int | None:
        """Return the id of the process that sent the request, or None if its connection is closed."""
        return find_peer_pid(self.peer_port, self.proxy_port)

    def kill_peer(self) -> None:
        """Kill the process that sent the request, and wait until its connection is closed."""
        pid = self.find_peer_pid()
        if pid is None or pid == os.getpid():
            raise ProcessLookupError(f"no other process holds the connection from port {self.peer_port}")
        psutil.Process(pid).kill()
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while self.find_peer_pid() is not None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"a child of process {pid} may have inherited its connection")
            time.sleep(0.01)


@dataclass(frozen=True)
class Call:
    """Call a hook: before the body is read, after half of it, or between the store's response and the client's."""

    hook: Callable[[Request], None]
    point: Point = "before"


@dataclass(frozen=True)
class Rule:
    """Which requests are affected, and how. If several rules match a request, the first one applies."""

    action: Action | Call
    operation: Operation | None = None
    key: str = ""  # Regular expression, searched for in the key.
    nth: int | None = None  # Affect only the n-th matching request, counted from 1.
    times: int | None = None  # Affect at most this many requests.
    probability: float = 1.0


class FaultProxy:
    """The proxy, which runs from `__enter__` to `__exit__`; the latter raises the first error of hooks or the store."""

    def __init__(self, upstream_endpoint: str, rules: Iterable[Rule] = (), seed: int = 0) -> None:
        upstream = urlsplit(upstream_endpoint)
        self.upstream, self.base_path = upstream.netloc, upstream.path
        self.errors: list[Exception] = []
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self._requests: dict[int, Request] = {}
        self._num_seen = 0
        self.set_rules(*rules)
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        """The port on 127.0.0.1 at which it listens."""
        return self._server.server_port

    @property
    def endpoint(self) -> str:
        """The URL that clients use as the store's."""
        return f"http://127.0.0.1:{self.port}{self.base_path}"

    @property
    def requests(self) -> list[Request]:
        """All requests since the start or the last `forget`, in order of arrival."""
        with self._lock:
            return list(self._requests.values())

    def count(self, operation: Operation, pattern: str = r".*") -> int:
        """Return the number of requests of an operation for keys that match a pattern."""
        return len([seen for seen in self.requests if seen.operation == operation and re.search(pattern, seen.key)])

    def forget(self) -> None:
        """Drop the recorded requests; the counts of the rules are kept."""
        with self._lock:
            self._requests.clear()

    def set_rules(self, *rules: Rule) -> None:
        """Replace the rules; their counts start at zero."""
        with self._lock:
            self._rules = [_RuleState(rule) for rule in rules]

    def clear(self) -> None:
        """Remove all rules."""
        self.set_rules()

    def begin(self, request: Request) -> tuple[int, Action | Call | None]:
        """Record a request; return its number, for `record_status`, and the action to apply to it."""
        with self._lock:
            self._num_seen += 1
            self._requests[self._num_seen] = request
            firing = [state for state in self._rules if state.is_due(request, self._random)]
            if not firing:
                return self._num_seen, None
            firing[0].num_fired += 1
            return self._num_seen, firing[0].rule.action

    def record_status(self, number: int, status: int) -> None:
        """Record the status of the response to a request."""
        with self._lock:
            if number in self._requests:  # Not dropped by `forget` in the meantime.
                self._requests[number] = replace(self._requests[number], status=status)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        if self.errors and error is None:
            raise self.errors[0]


@dataclass
class _RuleState:
    rule: Rule
    num_matched: int = 0
    num_fired: int = 0

    def is_due(self, request: Request, rng: random.Random) -> bool:
        if self.rule.operation not in (None, request.operation) or not re.search(self.rule.key, request.key):
            return False
        self.num_matched += 1
        return (
            self.rule.nth in (None, self.num_matched)
            and (self.rule.times is None or self.num_fired < self.rule.times)
            and (self.rule.probability >= 1 or rng.random() < self.rule.probability)
        )


def find_peer_pid(peer_port: int, proxy_port: int) -> int | None:
    """Return the id of the process at the other end of a connection to the proxy, or None if it is closed there."""
    for connection in psutil.net_connections(kind="tcp"):
        near, far = connection.laddr, connection.raddr
        if near and far and (near.port, far.port) == (peer_port, proxy_port):
            return connection.pid
    return None


OPERATIONS: dict[str, Operation] = {"GET": "GET", "HEAD": "HEAD", "PUT": "PUT", "DELETE": "DELETE"}


def classify(method: str, target: str, base_path: str = "") -> tuple[Operation, str]:
    """Return the operation and the key of a request from its method and its path as sent; the base comes before it."""
    _, _, key = target.partition("?")[0].removeprefix(f"{base_path}/").partition("/")
    operation = OPERATIONS.get(method, "POST")
    return ("LIST" if operation == "GET" and not key else operation), unquote(key)


def flip_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 1 for byte in data[middle : middle + 1]) + data[middle + 1 :]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._connections: set[Any] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        # Clients may disconnect at any time.
        if isinstance(error, Exception) and not isinstance(error, ConnectionError):
            self.proxy.errors.append(error)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client and one to the store; whole requests and responses are held in memory."""

    server: _Server
    protocol_version = "HTTP/1.1"
    # Otherwise the body of a response is delayed by 40 ms, until the headers are acknowledged.
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(self.server.proxy.upstream)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def handle_expect_100(self) -> bool:
        return True  # `read_body` sends the status 100 when it reads the body.

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):  # Any HTTP method.
            return self.serve
        raise AttributeError(name)

    def serve(self) -> None:
        proxy = self.server.proxy
        target = self.requestline.split(" ")[1]  # self.path loses one of two leading slashes.
        request = Request(*classify(self.command, target, proxy.base_path), self.client_address[1], proxy.port)
        number, action = proxy.begin(request)
        if action is Action.RESET:
            self.reset()
            return
        self.call_hook(action, "before", request)
        body = self.read_body(action, request)
        if isinstance(action, Action) and action in REFUSALS:
            status, code, message = REFUSALS[action]
            answer = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(answer)))]
            proxy.record_status(number, status)
            self.answer(status, code, headers, answer)
            return
        if action is Action.FLIP_BYTE and self.command == "PUT":
            body = flip_bit(body)
        response, answer = self.forward(target, body)
        self.call_hook(action, "after", request)
        if action is Action.LOST_ANSWER or (action is Action.CUT_BODY and not answer):
            self.reset()
            return
        headers = [header for header in response.getheaders() if header[0].lower() != "transfer-encoding"]
        if response.chunked:
            headers.append(("Content-Length", str(len(answer))))
        if action is Action.CUT_BODY:
            answer = answer[: len(answer) // 2]
        elif action is Action.FLIP_BYTE and self.command != "PUT":
            answer = flip_bit(answer)
        proxy.record_status(number, response.status)  # Before the client receives the response.
        self.answer(response.status, response.reason, headers, answer)
        # After the headers, because one of them may keep the connection open.
        self.close_connection |= response.will_close or action is Action.CUT_BODY

    def call_hook(self, action: Action | Call | None, point: Point, request: Request) -> None:
        if not (isinstance(action, Call) and action.point == point):
            return
        try:
            action.hook(request)
        except Exception as error:
            self.server.proxy.errors.append(error)
            raise ConnectionAbortedError from error
        if request.find_peer_pid() is None:  # The socket does not report this while it has unread data.
            raise ConnectionAbortedError("the client has disconnected")

    def read_body(self, action: Action | Call | None, request: Request) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        pieces = []
        for index, piece in enumerate(self.read_pieces()):
            pieces.append(piece)
            if index == 0:
                self.call_hook(action, "during", request)
        return b"".join(pieces)

    def read_pieces(self) -> Iterator[bytes]:
        """Read the body in two halves or, if it has no length, in its chunks."""
        if not self.is_chunked():
            length = int(self.headers.get("Content-Length", 0))
            yield self.read_exactly(length // 2)
            yield self.read_exactly(length - length // 2)
            return
        while size := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
            yield self.read_exactly(size)
            self.rfile.readline()
        if not self.rfile.readline():  # The empty line after the last chunk.
            raise ConnectionAbortedError("the body ends early")

    def read_exactly(self, length: int) -> bytes:
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionAbortedError("the body ends early")
        return data

    def is_chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

    def forward(self, target: str, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        try:
            if self.upstream.sock and select.select([self.upstream.sock], [], [], 0)[0]:
                self.upstream.close()  # The store closed the idle connection; the next request reopens it.
            self.upstream.putrequest(self.command, target, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                self.upstream.putheader(name, value)
            self.upstream.endheaders()
            if self.is_chunked():
                body = (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
            with suppress(ConnectionError):  # The store refused the request without reading it; see its response.
                self.upstream.send(body)
            response = self.upstream.getresponse()
            return response, response.read()
        except (OSError, http.client.HTTPException) as error:
            self.server.proxy.errors.append(error)
            raise ConnectionAbortedError from error

    def answer(self, status: int, reason: str, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reset(self) -> None:
        """Close with an RST, which unlike an orderly close is never mistaken for the end of a response."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # It also holds the socket open.
        self.connection.close()

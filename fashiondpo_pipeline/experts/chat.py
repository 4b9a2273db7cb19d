"""A client of OpenAI-compatible chat servers that gives up in time: deadlines, bounded retries, bounded calls."""

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.foreign import Unreadable, parse_json, seen

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses that may be another next time
LONGEST_WAIT = 60.0  # seconds between two tries, whatever Retry-After says
LARGEST_REPLY = 1 << 22  # bytes
REFUSED = {401: "the key is not accepted", 403: "access is refused", 404: "there is no such model or address", 405: "it is no chat server"}


class NoAnswer(Exception):
    """A request that stays without an answer; the message says why, in words for the score table."""


class Rejected(NoAnswer):
    """The server understood the request and will not have it (400, 422): asking for less may help."""


@dataclass
class Chat:
    """POST base_url/chat/completions, in a `with` block, for which its connections are kept. Several threads may ask at once.

    timeout: seconds for a whole answer. retries: more tries after the first. back_off: seconds before the first of them, doubled each
    time, unless the server's Retry-After asks for more. most_calls: requests after which it stops, each try counted;
    a run has one of these for each step that scores. most_failures: unanswered questions in a row after which it stops.
    """

    base_url: str
    key_variable: str | None = None
    timeout: float = 60.0
    retries: int = 3
    back_off: float = 1.0
    most_calls: int | None = None
    most_failures: int = 5
    connections: int = 8
    calls: int = 0
    failures: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._headers = {}
        if self.key_variable:
            key = os.environ.get(self.key_variable)
            if not key:
                raise UserError(f"the environment variable {self.key_variable}, which should hold the key of {self.base_url}, is not set: "
                                f"export {self.key_variable}=...")
            self._headers["Authorization"] = f"Bearer {key.strip()}"
        self.address = self.base_url.rstrip("/") + "/chat/completions"

    def __enter__(self) -> "Chat":
        import httpx2
        from anyio.from_thread import start_blocking_portal

        limits = httpx2.Limits(max_connections=self.connections, max_keepalive_connections=self.connections)
        with ExitStack() as held:
            self._loop = held.enter_context(start_blocking_portal())
            client = httpx2.AsyncClient(headers=self._headers, timeout=None, limits=limits)  # httpx's own begins anew with every byte
            self._http = held.enter_context(self._loop.wrap_async_context_manager(client))
            self._held = held.pop_all()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._held.__exit__(*problem)

    def ask(self, body: Mapping) -> dict:
        """The first choice of the answer. Raises NoAnswer, or UserError where going on is of no use."""
        try:
            answer = self._persist(body)
        except Rejected:
            raise
        except NoAnswer as problem:
            if self._stopped.is_set():
                raise  # whoever stopped it says why
            with self._lock:
                self.failures += 1
                failed = self.failures
            if failed >= self.most_failures:
                self._stop(f"{self.base_url} left {failed} questions in a row without an answer ({problem}): see that the server is well "
                           "and run the same command again")
            raise
        with self._lock:
            self.failures = 0
        return answer

    def _persist(self, body: Mapping) -> dict:
        """One question, asked again while that may help."""
        for left in range(self.retries, -1, -1):
            if self._stopped.is_set():
                raise NoAnswer("the scoring was stopped")
            with self._lock:
                spent = self.most_calls is not None and self.calls >= self.most_calls
                self.calls += not spent
            if spent:
                self._stop(f"{self.base_url} was asked {self.most_calls} times, as many as most_calls allows: raise it to go on")
            wait = self.back_off * 2 ** (self.retries - left)
            try:
                return self._once(body)
            except _Unwell as problem:
                reason, wait = str(problem), min(max(wait, problem.wait), LONGEST_WAIT)
            if left:
                self._stopped.wait(wait)
        raise NoAnswer(reason)

    def _once(self, body: Mapping) -> dict:
        import httpx2

        try:
            return self._understood(*self._loop.call(self._post, body))
        except httpx2.ConnectError as problem:
            raise _Unwell(f"no connection: {problem}") from None
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as problem:
            self._stop(f"base_url '{self.base_url}' is no address ({problem}): write it like http://localhost:8000/v1")
        except httpx2.RequestError as problem:
            raise _Unwell(f"the answer was cut off ({problem or type(problem).__name__})") from None

    async def _post(self, body: Mapping) -> tuple[int, bytes, str | None]:
        """(status, content, Retry-After), or given up at the deadline, wherever the server is by then: connection, head or content."""
        import anyio

        begun, content = "", bytearray()
        with anyio.move_on_after(self.timeout):
            async with self._http.stream("POST", self.address, json=body) as response:
                begun = "whole "
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > LARGEST_REPLY:
                        raise _Unwell("the answer is larger than 4 MiB")
                return response.status_code, bytes(content), response.headers.get("retry-after")
        raise _Unwell(f"no {begun}answer within {self.timeout:g} s")

    def _understood(self, status: int, content: bytes, retry_after: str | None) -> dict:
        if status in AGAIN:
            raise _Unwell(f"the server answered {status}", _seconds(retry_after))
        if status in REFUSED:
            self._stop(f"{self.address} answered {status}, {REFUSED[status]} ({_detail(content)}): check base_url, model and key_variable")
        if status in (400, 422):
            raise Rejected(f"the server answered {status}: {_detail(content)}")
        if status != 200:
            raise NoAnswer(f"the server answered {status}")
        try:
            answer = parse_json(content)
        except Unreadable:
            raise _Unwell("the answer is not JSON") from None
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not choices:
            raise _Unwell("the answer holds no choice")
        if not isinstance(choices[0], dict) or not isinstance(choices[0].get("message"), dict):
            raise _Unwell("the answer's choice holds no message")
        return choices[0]

    def _stop(self, sentence: str) -> NoReturn:
        self._stopped.set()
        raise UserError(sentence)


class _Unwell(Exception):
    """Something that may be better next time; `wait`: what the server asks for, seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


def _seconds(retry_after: str | None) -> float:
    """Retry-After in seconds; 0 where there is none, or a date."""
    try:
        found = float(retry_after or 0)
    except ValueError:
        return 0.0
    return found if found > 0 else 0.0  # which NaN is not


def _detail(content: bytes) -> str:
    """What the server says of an error, in one short line."""
    text = content.decode("utf-8", "replace")
    try:
        found = parse_json(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except Unreadable:
        pass
    return seen(" ".join(text.split()), 200) or "no reason given"

"""The studio takes no file from anybody: every route that the framework publishes is asked for one, through the guard that stands before it."""

import asyncio
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import made, session_of  # noqa: F401 - a fixture

from fashiondpo_pipeline import guard
from fashiondpo_pipeline.guard import MOST, Guard, Refused, plain

HOST = "127.0.0.1:7860"
OURS = {"host": HOST, "origin": f"http://{HOST}"}


def ask(app, method: str, path: str, body: bytes = b"", headers: dict | None = None, piece: int = 1 << 16) -> tuple[int, bytes]:
    """(status, the beginning of the answer) of one request, its message in pieces; who asks is gone when the message is told."""
    path, _, query = path.partition("?")
    head = [(name.lower().encode(), value.encode()) for name, value in (OURS | (headers or {})).items() if value]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
             "raw_path": path.encode(), "root_path": "", "query_string": query.encode(), "headers": head,
             "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 7860)}
    pieces = [body[start : start + piece] for start in range(0, len(body), piece)] or [b""]
    told, taken = [], 0

    async def receive() -> dict:
        nonlocal taken
        taken += 1
        if taken > len(pieces):
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": pieces[taken - 1], "more_body": taken < len(pieces)}

    async def send(message: dict) -> None:
        told.append(message)

    async def asking() -> None:
        async with asyncio.timeout(20):
            await app(scope, receive, send)

    asyncio.run(asking())
    ask.taken = taken
    return told[0]["status"], b"".join(message.get("body", b"") for message in told[1:3])[:2000]


# -- every route of the framework

def routes(found, prefix: str = "") -> list[tuple[str, str]]:
    """(method, path) of every route below an application, those of routers within it too."""
    every = []
    for route in found:
        path = prefix + getattr(route, "path", "")
        every += [(method, path) for method in getattr(route, "methods", None) or ()]
        for inner in (getattr(route, "app", None), getattr(route, "original_router", None)):
            every += routes(getattr(inner, "routes", ()), path)
    return list(dict.fromkeys(every))


@pytest.fixture
def studio(made, monkeypatch, tmp_path):  # noqa: F811
    """(the page of a run as it is mounted, without its guard; a folder of its own for what clients leave)."""
    gradio, fastapi = pytest.importorskip("gradio"), pytest.importorskip("fastapi")
    from fashiondpo_pipeline.studio import Books, build
    from stages.studio import of_run

    left = tmp_path / "left"
    left.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(left))
    monkeypatch.setattr(tempfile, "tempdir", str(left))
    loops, begin = [], asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: loops.append(begin()) or loops[-1])  # gradio leaves one open for each lock
    found = of_run(session_of(made), 1)
    page = build(found, Books(found, lambda text: None, None))
    app = gradio.mount_gradio_app(fastapi.FastAPI(openapi_url=None), page, "/", allowed_paths=[], ssr_mode=False, pwa=False, mcp_server=False,
                                  enable_monitoring=False, show_error=False)
    yield app, left
    for loop in loops:
        loop.close()


def of_files(secret: Path) -> list[object]:
    """Forms in which a client names a file or an address to the framework."""
    meta = {"_type": "gradio.FileData"}
    one = {"path": str(secret), "meta": meta}
    return [one, {"path": str(secret)}, {"url": "http://127.0.0.1:1/x", "path": "x", "meta": meta}, [one], {"image": one}, {"a": [{"b": one}]}]


def messages(dependencies: list[dict], secret: Path) -> list[bytes]:
    """Each of those at each place of each thing that the page can be asked to do."""
    found = []
    for what in of_files(secret):
        for dependency in dependencies:
            many = len(dependency["inputs"])
            for place in range(many):
                data = [None] * many
                data[place] = what
                found.append({"data": data, "fn_index": dependency["id"], "session_hash": "s", "event_data": None, "trigger_id": None})
        found += [{"data": [], "fn_index": 0, "session_hash": "s", "event_data": what}, {"data": what, "fn_index": 0, "session_hash": "s"},
                  {"component_id": 1, "fn_name": "x", "session_hash": "s", "data": what}]
    twice = b'{"data": %s, "fn_index": 0, "session_hash": "s", "data": [null]}' % json.dumps([of_files(secret)[0]]).encode()
    return [*(json.dumps(message).encode() for message in found), twice]  # the last is let through with what it says last, which is nothing


def test_no_route_of_the_framework_takes_a_file_from_a_client(studio, made):  # noqa: F811
    app, left = studio
    secret = made / "secret.txt"
    secret.write_text("a secret that is nobody's")
    dependencies = app.routes[0].app.get_blocks().config["dependencies"]
    guarded, every = Guard(app, "127.0.0.1"), routes(app.routes)
    published = {path for _, path in every}
    assert {"/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/file={path_or_url:path}", "/gradio_api/run/{api_name}"} <= published
    assert len(every) > 60, "the walk has found the framework's own routers"
    form = (b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.txt"\r\nContent-Type: text/plain\r\n\r\nhello\r\n--b--\r\n',
            {"content-type": "multipart/form-data; boundary=b"})
    some = messages(dependencies[-1:], secret)
    for method, template in every:
        path = re.sub(r"\{(\w+)(:path)?\}", lambda m: str(secret).lstrip("/") if m[2] else "0", template) or "/"
        if method == "GET" and path.startswith(("/gradio_api/heartbeat", "/gradio_api/queue/data")):
            continue  # they stream to whoever listens, and take nothing
        sent = [(b"", {}), form, *((body, {"content-type": "application/json"}) for body in some)]
        for body, headers in sent if method == "POST" else sent[:1]:
            status, answer = ask(guarded, method, path, body, headers)
            assert b"a secret" not in answer, (method, path)
            assert method != "POST" or status in (400, 404) or body == some[-1], (method, path, body[:80])
    assert list(left.rglob("*")) == [], "nothing is copied, fetched or uploaded"


def test_no_place_of_any_click_takes_a_file(studio, made):  # noqa: F811
    app, left = studio
    (made / "secret.txt").write_text("a secret that is nobody's")
    dependencies = app.routes[0].app.get_blocks().config["dependencies"]
    found = messages(dependencies, made / "secret.txt")
    assert len(found) > 100
    for body in found:
        assert ask(Guard(app, "127.0.0.1"), "POST", "/gradio_api/queue/join", body)[0] == 400 or body == found[-1]
    assert list(left.rglob("*")) == []


def test_without_the_guard_the_framework_would_copy_it(studio, made):  # noqa: F811
    """What the test above relies on: the same message leaves a copy behind where nobody stands before the page."""
    app, left = studio
    (made / "secret.txt").write_text("a secret that is nobody's")
    blocks = app.routes[0].app.get_blocks()
    queue = next(c["id"] for c in blocks.config["components"] if c["props"].get("elem_id") == "queue")
    fn, place = next((d["id"], d["inputs"].index(queue)) for d in blocks.config["dependencies"] if queue in d["inputs"])
    data = [None] * len(blocks.config["dependencies"][fn]["inputs"])
    data[place] = {"path": str(made / "secret.txt"), "meta": {"_type": "gradio.FileData"}}

    async def click() -> None:
        with pytest.raises(Exception):  # noqa: B017 - a dropdown that is no text fails, after the copy
            await blocks.process_api(fn, data)

    asyncio.run(click())
    assert [path.name for path in left.rglob("*") if path.is_file()] == ["secret.txt"]


# -- the guard by itself

class Inner:
    """An application that tells what it was given."""

    def __init__(self):
        self.seen: list[tuple[dict, bytes]] = []

    async def __call__(self, scope, receive, send):
        message = await receive()
        self.seen.append((scope, message["body"]))
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})


def guarded(method: str = "POST", path: str = "/gradio_api/queue/join", body: bytes = b"{}", headers: dict | None = None, piece: int = 1 << 16):
    inner = Inner()
    status, _ = ask(Guard(inner, "127.0.0.1"), method, path, body, headers, piece)
    return status, inner.seen


def test_a_click_is_let_through_as_it_was_looked_at():
    body = b'{"data": ["ann", 3, null, true, 0.5], "fn_index": 4, "session_hash": "s", "event_data": null, "trigger_id": 7}'
    status, [(scope, seen)] = guarded(body=body, piece=5)
    assert status == 200 and json.loads(seen) == json.loads(body)
    assert dict(scope["headers"])[b"content-length"] == str(len(seen)).encode()
    _, [(_, seen)] = guarded(body=b'{"data": [{"path": "x"}], "data": []}')
    assert seen == b'{"data": []}', "of a key that stands twice the framework sees what the guard saw"


@pytest.mark.parametrize("body", [
    b"", b"nonsense", b"[]", b'"x"', b'{"data": {"path": "/etc/passwd"}}', b'{"data": [[]]}', b'{"data": [], "event_data": {}}', b'{"x": []}',
    b'{"data": [NaN]}', b"[" * 100_000, b'{"data": ' + b"[" * 100_000, b'{"a": ' * 100_000, b"\xff\xfe", b'{"data": [1e999]}',
    b'{"data": [' + b"9" * 5000 + b"]}",
])
def test_a_message_that_is_no_click_is_refused_before_the_page_sees_it(body):
    assert guarded(body=body) == (400, [])


@given(st.recursive(st.none() | st.booleans() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_nothing_nested_gets_through(value):
    body = json.dumps({"data": [value], "event_data": None}).encode()
    nested = isinstance(value, dict | list)
    try:
        assert json.loads(plain(body))["data"] == [value] and not nested
    except Refused as refused:
        assert refused.status == 400 and nested


@pytest.mark.parametrize("headers", [{"content-length": str(MOST + 1)}, {}, {"transfer-encoding": "chunked"}, {"content-length": "9" * 30},
                                     {"content-length": "-1"}, {"content-length": "x"}])
def test_a_message_is_bounded_however_it_comes(headers):
    body = b'{"data": ["' + b"x" * (64 * MOST) + b'"]}'
    assert guarded(body=body, headers=headers) == (413, [])
    assert ask.taken <= MOST // (1 << 16) + 2, "the rest is not read"


def test_a_message_that_is_asked_with_a_reading_word_is_not_taken():
    assert guarded("GET", "/config", b"x" * 10, {"content-length": "10"}) == (413, [])
    assert guarded("GET", "/config", b"x" * 10, {"transfer-encoding": "chunked"}) == (413, [])
    status, [(_, seen)] = guarded("GET", "/config", b"smuggled")
    assert status == 200 and seen == b""


@pytest.mark.parametrize("path", sorted(guard._SAID) + sorted(guard._READ) + [f"{below}x" for below in guard._BELOW])
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1234", "https://127.0.0.1:7860.evil.example", "http://["])
def test_every_route_of_the_page_is_for_its_own_origin(path, origin):
    method = "POST" if path in guard._SAID else "GET"
    assert guarded(method, path, b"{}" if method == "POST" else b"", {"origin": origin}) == (403, [])
    assert guarded(method, path, b"{}" if method == "POST" else b"", {"host": "evil.example:7860", "origin": "http://evil.example:7860"}) == (403, [])


def test_a_message_says_where_it_comes_from():
    assert guarded(headers={"origin": ""}) == (403, [])
    assert guarded("GET", "/config", b"", {"origin": ""})[0] == 200


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "post"])
def test_other_words_than_get_and_post_are_not_known(method):
    assert guarded(method, "/gradio_api/queue/join") == guarded(method, "/config") == (404, [])


def test_a_websocket_is_closed_at_once():
    told = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        told.append(message)

    async def inner(*_):
        raise AssertionError("the page has no websocket")

    asyncio.run(Guard(inner, "127.0.0.1")({"type": "websocket", "path": "/gradio_api/queue/join", "headers": []}, receive, send))
    assert told == [{"type": "websocket.close", "code": 1008}]

"""A small hub on this machine: one data set at one commit, from which files and parts of files are got."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `files` as the data set ann/hats at COMMIT. sent: path -> bytes that were sent of it. failing: answers 500 for files' content."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.sent, self.asked, self.failing = files, {}, [], False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = unquote(urlsplit(self.path).path)
                outer.asked.append(path)
                about = re.fullmatch(rf"/api/datasets/ann/hats/(?:revision/{COMMIT}|tree/{COMMIT}(?:/(.*))?|paths-info/{COMMIT})", path)
                content = re.fullmatch(rf"/datasets/ann/hats/resolve/{COMMIT}/(.*)", path)
                if about and "/tree/" in path:
                    below = f"{about[1]}/" if about[1] else ""
                    found = [entry(name, data) for name, data in sorted(outer.files.items()) if name.startswith(below)]
                    self.say(200, found) if found else self.say(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
                elif about:
                    self.say(200, {"id": "ann/hats", "sha": COMMIT, "siblings": []})
                elif content and outer.failing:
                    self.say(500, {"error": "broken"})
                elif content and content[1] in outer.files:
                    self.part(content[1])
                else:
                    self.say(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound" if content else "RepoNotFound"})

            def do_POST(self):
                asked = self.rfile.read(int(self.headers["content-length"]))
                names = json.loads(asked)["paths"]
                self.say(200, [entry(name, outer.files[name]) for name in names if name in outer.files])

            def part(self, name):
                data, bounds = outer.files[name], re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
                start, end = (int(bounds[1]), int(bounds[2]) + 1) if bounds else (0, len(data))
                outer.sent[name] = outer.sent.get(name, 0) + len(data[start:end])
                self.send(206 if bounds else 200, data[start:end], {"ETag": '"x"', "X-Repo-Commit": COMMIT})

            def say(self, status, content, headers=None):
                self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

            def send(self, status, data, headers):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def entry(name: str, data: bytes) -> dict:
    return {"type": "file", "oid": "0" * 40, "size": len(data), "path": name}

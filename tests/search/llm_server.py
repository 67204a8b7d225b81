"""A local HTTP server with scripted replies, for tests: OpenAI's chat completions and Anthropic's messages.

Usage: ``python llm_server.py``. It prints its port. ``PUT /`` with a script, ``{"replies": [...], "formats": [...]}``,
gives its number N, and ``/N/v1`` answers the n-th POST with the n-th reply, later ones with the last. A reply is one of

- ``{"text": "..."}``: a completion (``"finish": "length"``: cut off by the token limit); where the request has a tool,
  in a call of it; ``"times": N``: the text N times over;
- ``{"status": 429, "headers": {...}, "body": ...}``: an error or a redirect;
- ``{"raw": "..."}``: HTTP 200 with a body that is no completion;
- ``{"hang": true}``: never answers; ``{"trickle": true}``: one blank every 50 ms, for ever;
- ``{"cut": true}``: stops in the middle of the body; ``{"endless": true}``: never stops.

``formats``: forms that the server takes (``tool`` and response formats), any if absent; others get the status
``refuse`` (400) and use up no reply. ``"sampling": false``: so do requests with a temperature. ``"tools": false``:
tools are taken and ignored. ``"usage": false``: no tokens are counted.

With ``{"designer": KIND}`` in place of replies, a scripted designer reads the prompts and answers, see ``scripted.py``;
KIND may also be "slow" (never answers in time) and "cut" (stops in mid-stream). ``/N/KIND/v1`` is answered by that one,
whatever the script says. ``GET /N`` gives all requests so far: path, headers, body and seconds since the start.
:class:`LLMServer` is such a process, :class:`Served` one script of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

if __name__ == "__main__":  # a script finds its neighbours by itself
    import scripted


class LLMServer:
    """The process; ends with :meth:`close`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                         text=True)
        assert self._process.stdout is not None
        self._address = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def serve(self, *replies: dict[str, Any], **script: Any) -> Served:
        """Adds a script."""
        data = json.dumps({"replies": replies, **script}).encode()
        with _opener.open(urllib.request.Request(self._address, data, method="PUT")) as f:
            return Served(f"{self._address}/{json.load(f)}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Served:
    """A script that is served at ``url``."""

    def __init__(self, address: str) -> None:
        self._address, self.url = address, f"{address}/v1"

    def of(self, kind: str) -> str:
        """Where a scripted designer answers."""
        return f"{self._address}/{kind}/v1"

    @property
    def requests(self) -> list[dict[str, Any]]:
        """All requests so far."""
        with _opener.open(self._address) as f:
            return json.load(f)  # type: ignore[no-any-return]


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> None:
    """Serves until it is killed."""
    scripts: list[dict[str, Any]] = []
    lock, start = threading.Lock(), time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def send(self, status: int, body: bytes, headers: dict[str, str], claim: int | None = None) -> None:
            self.send_response(status)
            for k, v in {"Content-Type": "application/json", **headers}.items():
                self.send_header(k, v)
            self.send_header("Content-Length", str(len(body) if claim is None else claim))
            self.end_headers()
            self.wfile.write(body)

        def read(self) -> Any:
            return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

        def do_PUT(self) -> None:
            with lock:
                scripts.append({**self.read(), "seen": [], "used": 0})
                self.send(200, str(len(scripts) - 1).encode(), {})

        def do_GET(self) -> None:
            self.send(200, json.dumps(scripts[int(self.path[1:])]["seen"]).encode(), {})

        def do_POST(self) -> None:
            body = self.read()
            form = body.get("response_format", {}).get("type", "tool" if "tools" in body else "plain")
            number, kind, *path = self.path[1:].split("/")
            script = scripts[int(number)]
            if kind not in ("good", "stubborn", "garbage", "reasoner", "slow", "cut"):
                kind, path = script.get("designer"), [kind, *path]
            with lock:
                script["seen"].append({"path": "/" + "/".join(path), "body": body, "at": time.monotonic() - start,
                                       "headers": {k.lower(): v for k, v in self.headers.items()}})
                hot = "temperature" in body and not script.get("sampling", True)
                refused = hot or form not in script.get("formats", [form])
                if kind is not None:
                    reply = ({"hang": True} if kind == "slow" else {"cut": True} if kind == "cut" else
                             {"text": scripted.answer(kind, body["messages"], len(script["seen"]))})
                else:
                    reply = script["replies"][min(script["used"], len(script["replies"]) - 1)]
                    script["used"] += not refused
            if refused:
                error = {"error": {"message": f"unknown: {'temperature' if hot else form}"}}
                self.send(script.get("refuse", 400), json.dumps(error).encode(), {})
            elif "status" in reply:
                error = reply.get("body", {"error": {"message": "scripted"}})
                self.send(reply["status"], json.dumps(error).encode(), reply.get("headers", {}))
            elif reply.get("hang"):
                time.sleep(3600)
            elif reply.get("trickle"):
                self.send(200, b" ", {}, claim=10**6)
                while True:
                    time.sleep(0.05)
                    self.wfile.write(b" ")
            elif reply.get("cut"):
                self.send(200, b'{"id": "x", "choices": [{"mess', {}, claim=10**4)
                self.close_connection = True
            elif reply.get("endless"):
                self.send(200, b'{"id": "', {}, claim=10**12)
                while True:
                    self.wfile.write(b"x" * 100_000)
            elif "raw" in reply:
                self.send(200, reply["raw"].encode(), {})
            else:
                called = "tools" in body and script.get("tools", True)
                done = completion(self.path, body, reply, called)
                if not script.get("usage", True):
                    done["usage"] = dict.fromkeys(done["usage"], 0)
                self.send(200, json.dumps(done).encode(), {})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


def completion(path: str, body: dict[str, Any], reply: dict[str, Any], called: bool) -> dict[str, Any]:
    """The reply in the form of OpenAI or, on ``/messages``, of Anthropic; ``called``: as a call of the request's tool.
    Tokens: 1000 in, 100 out."""
    text, cut = reply["text"] * reply.get("times", 1), reply.get("finish") == "length"
    if path.endswith("/messages"):
        content: dict[str, Any] = {"type": "text", "text": text}
        if called:
            content = {"type": "tool_use", "id": "t", "name": body["tools"][0]["name"], "input": arguments(text)}
        return {"id": "m", "type": "message", "role": "assistant", "model": body["model"], "content": [content],
                "stop_reason": "max_tokens" if cut else "tool_use" if called else "end_turn", "stop_sequence": None,
                "usage": {"input_tokens": 1000, "output_tokens": 100}}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if called:
        function = {"name": body["tools"][0]["function"]["name"], "arguments": text}
        message = {"role": "assistant", "content": None,
                   "tool_calls": [{"id": "t", "type": "function", "function": function}]}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "message": message,
                         "finish_reason": reply.get("finish", "tool_calls" if called else "stop")}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}}


def arguments(text: str) -> Any:
    """Arguments of a tool in Anthropic's format, which are an object."""
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    return data if isinstance(data, dict) else {"said": text}


if __name__ == "__main__":
    main()

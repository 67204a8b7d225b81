"""A local HTTP server with scripted replies, for tests: OpenAI's chat completions and Anthropic's messages.

Usage: ``python llm_server.py SCRIPT``, SCRIPT being JSON text or a file name: ``{"replies": [...], "formats": [...]}``.
It prints its port, and answers the n-th POST with the n-th reply, later ones with the last. A reply is one of

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
KIND may also be "slow" (never answers in time) and "cut" (stops in mid-stream). A path that begins with a kind,
``/good/v1/...``, is answered by that one, whatever the script says.
``GET /requests`` gives all requests so far: path, headers, body and seconds since the start.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script finds its neighbours by itself
    import scripted


def main(script: dict[str, Any]) -> None:
    """Serves until it is killed."""
    seen: list[dict[str, Any]] = []
    lock, start, used, count = threading.Lock(), time.monotonic(), [0], [0]

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

        def do_GET(self) -> None:
            self.send(200, json.dumps(seen).encode(), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            form = body.get("response_format", {}).get("type", "tool" if "tools" in body else "plain")
            kind = self.path.split("/")[1]
            if kind not in ("good", "stubborn", "garbage", "reasoner", "slow", "cut"):
                kind = script.get("designer")
            with lock:
                count[0] += 1
                seen.append({"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()},
                             "body": body, "at": time.monotonic() - start})
                hot = "temperature" in body and not script.get("sampling", True)
                refused = hot or form not in script.get("formats", [form])
                if kind is not None:
                    reply = ({"hang": True} if kind == "slow" else {"cut": True} if kind == "cut" else
                             {"text": scripted.answer(kind, body["messages"], count[0])})
                else:
                    reply = script["replies"][min(used[0], len(script["replies"]) - 1)]
                    used[0] += not refused
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
    arg = sys.argv[1]
    main(json.loads(arg if arg.lstrip().startswith("{") else Path(arg).read_text()))

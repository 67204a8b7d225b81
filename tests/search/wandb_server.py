"""A small W&B server: it answers what the client asks for, and keeps what was uploaded.

It knows the requests that logging, resuming, syncing and artifacts need, in the form of the GraphQL API and of the file
stream that W&B's own client speaks; anything else is answered with nulls.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandBServer:
    """Serves on a free port of this machine from the start to :meth:`close`.

    Attributes:
        runs: by id, the last variables of each run's ``UpsertBucket``.
        rows: by run, rows of the history by their place in the file stream.
        files: content of uploaded files by path.
        artifacts: variables of each ``CreateArtifact``.
        used: variables of each ``UseArtifact``.
        operations: names of all requests.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.files: dict[str, bytes] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.used: list[dict[str, Any]] = []
        self.operations: list[str] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """From now on connections are refused."""
        self._http.shutdown()
        self._http.server_close()

    def artifact_name(self, i: int) -> str:
        """Name of the i-th artifact."""
        v = self.artifacts[i]
        return str({**v, **v.get("input", {})}["artifactCollectionName"])

    def stream(self, run: str, data: dict[str, Any]) -> None:
        """What a run sends to its file stream: lines of files at offsets."""
        history = data.get("files", {}).get("wandb-history.jsonl", {})
        kept = self.rows.setdefault(run, {})
        for i, line in enumerate(history.get("content", []), int(history.get("offset", 0))):
            kept[i] = json.loads(line)

    def answer(self, name: str, v: dict[str, Any]) -> dict[str, Any]:
        """The reply to a GraphQL request."""
        self.operations.append(name)
        if name == "UpsertBucket":
            run = v.get("name") or v.get("id") or ""
            self.runs[run] = {**self.runs.get(run, {}), **{k: x for k, x in v.items() if x is not None}}
            return {"upsertBucket": {"inserted": True, "bucket": {
                "id": run, "name": run, "displayName": v.get("displayName"), "description": "", "config": "{}",
                "sweepName": None, "historyLineCount": len(self.rows.get(run, {})),
                "project": {"id": "P", "name": v.get("project") or "p", "entity": {"id": "E", "name": "someone"}}}}}
        if name == "RunResumeStatus":
            run = v["name"]
            if run not in self.runs:
                return {"model": {"id": "P", "name": v["project"], "entity": {"id": "E", "name": "someone"},
                                  "bucket": None}}
            rows = self.rows.get(run, {})
            return {"model": {"id": "P", "name": v["project"], "entity": {"id": "E", "name": "someone"}, "bucket": {
                "id": run, "name": run, "summaryMetrics": "{}", "displayName": run, "logLineCount": 0,
                "historyLineCount": len(rows), "eventsLineCount": 0, "eventsTail": "[]", "config": "{}", "tags": [],
                "historyTail": json.dumps([json.dumps(rows[max(rows)])] if rows else []), "notes": "",
                "wandbConfig": json.dumps({"t": 1})}}}
        if name == "CreateRunFiles":
            return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": [
                {"name": f, "uploadUrl": f"{self.url}/upload/{v['run']}/{f}"} for f in v["files"]]}}
        if name == "CreateArtifact":
            self.artifacts.append(v)
            return {"createArtifact": {"artifact": {"id": f"A{len(self.artifacts)}", "state": "PENDING",
                                                    "artifactSequence": {"id": "S", "latestArtifact": None}}}}
        if name == "CreateArtifactManifest":
            return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": {
                "id": "F", "name": "manifest", "displayName": "manifest", "uploadHeaders": [],
                "uploadUrl": f"{self.url}/upload/{v['artifactID']}/manifest.json"}}}}
        if name == "CreateArtifactFiles":
            files = v.get("artifactFiles") or v.get("input", {}).get("artifactFiles") or []
            return {"createArtifactFiles": {"files": {"edges": [{"node": {
                "id": f"F{i}", "name": f["name"], "displayName": f["name"], "uploadHeaders": [],
                "storagePath": f["name"],
                "uploadUrl": f"{self.url}/upload/{f['artifactID']}/{f['name']}", "uploadMultipartUrls": None,
                "artifact": {"id": f["artifactID"]}}} for i, f in enumerate(files)]}}}
        if name == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}
        if name == "UseArtifact":
            self.used.append(v)
            return {"useArtifact": {"artifact": {"id": v.get("artifactID"), "digest": "d", "description": "",
                                                 "state": "COMMITTED", "createdAt": "", "metadata": "{}"}}}
        if "iewer" in name:
            return {"viewer": {"id": "V", "entity": "someone", "username": "someone", "flags": "{}", "email": "",
                               "admin": False, "apiKeys": {"edges": []}, "teams": {"edges": []}}}
        return {"project": None}

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def _body(self) -> bytes:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

            def _reply(self, data: Any) -> None:
                body = json.dumps(data).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self._reply({})

            def do_PUT(self) -> None:
                data = self._body()
                with server._lock:
                    server.files[self.path.removeprefix("/upload/")] = data
                self._reply({})

            def do_POST(self) -> None:
                data = self._body()
                if self.path == "/graphql":
                    q = json.loads(data)
                    found = re.search(r"(?:query|mutation)\s+(\w+)", q["query"])
                    with server._lock:
                        out = server.answer(q.get("operationName") or (found[1] if found else ""),
                                            q.get("variables") or {})
                    self._reply({"data": out})
                    return
                if self.path.endswith("/file_stream"):
                    with server._lock:
                        server.stream(self.path.split("/")[-2], json.loads(data))
                self._reply({})

        return Handler

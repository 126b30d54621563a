"""A stand-in for the Hugging Face hub on the loopback: repositories that clients make, and commits of files to them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """What clients have uploaded: ``repositories``, by name and file; ``private``, the names of private ones.

    Only ``token`` may write. Weights go the way of large files, all others into the commit itself.
    """

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}
        self.refuses_large = False

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body, hub = self.rfile.read(int(self.headers["Content-Length"])), self.server
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            hub.repositories.setdefault(name, {})
            hub.private |= {name} if wanted.get("private") or wanted.get("visibility") == "private" else set()
            return self._answer({"url": f"{hub.address}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path.endswith("/objects/batch"):
            return self._large(json.loads(body)["objects"])
        name, _, action = self.path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            return self._answer({"files": [
                {"path": f["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]})  # fmt: skip
        assert action == "commit", self.path
        return self._commit(name, [json.loads(line) for line in body.splitlines()])

    def _large(self, objects: list[dict[str, Any]]) -> None:
        if self.server.refuses_large:
            return self._answer({"error": "no storage left"}, 403)
        return self._answer({"transfer": "basic", "objects": [
            {**o, "actions": {"upload": {"href": f"{self.server.address}/large/{o['oid']}", "header": {}}}}
            for o in objects
        ]})  # fmt: skip

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                self.server.messages.append(value["summary"])
        self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.address}/{name}/commit/0"})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.large[oid] = content
        self._answer({})

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

"""A stand-in for the Weights & Biases server on a loopback port: enough of it for the real client, online and syncing.

It stores uploads as the real server does: lines go to the offset that the client states, so that a wrong offset of a
resumed run shows as lost lines, and a resuming client is told the current state. It checks nothing, and refuses the
requests that a test selects.
"""

import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import quote, unquote

ENTITY = "somebody"

Fault = Literal[
    "error",  # answers with 500, which the client takes for passing
    "forbidden",  # answers with 403, which it takes for final
    "reset",  # cuts the connection
    "hang",  # accepts the connection and never answers
    "refuse",  # accepts no connection
]


@dataclass
class Run:
    """One run in W&B."""

    name: str = ""  # as shown; `WandbServer.runs` has it by its id
    project: str = ""
    upserted: dict[str, Any] = field(default_factory=dict)  # the newest value of each fact of the run
    streams: dict[str, list[str]] = field(default_factory=dict)  # the lines of wandb-history.jsonl and others
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record for each `_step`: a record that is uploaded again is the same record."""
        rows = [json.loads(line) for line in self.streams.get("wandb-history.jsonl", [])]
        return list({row["_step"]: row for row in rows}.values())

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads(self.streams.get("wandb-summary.json", ["{}"])[0])
        return summary

    @property
    def config(self) -> dict[str, Any]:
        return {key: entry["value"] for key, entry in json.loads(self.upserted.get("config", "{}")).items()}


class WandbServer(ThreadingHTTPServer):
    """Runs by their id, and the headers and bodies of all requests as they came. Serves until it is closed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, Run] = {}
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.operations: list[str] = []  # of GraphQL
        self.connections = 0
        self.lock = threading.Lock()
        self.recovered = threading.Event()
        self._fault: Fault | None = None
        self._answers_left = 0
        self._serve()

    def fail(self, fault: Fault, after: int = 0) -> None:
        """Fail every request in this way from now on, or once `after` more have been answered."""
        self.recovered.clear()
        self._fault, self._answers_left = fault, after
        if fault == "refuse":
            self._stop()

    def recover(self) -> None:
        """Answer again. Requests that have waited until now get no answer."""
        refused = self._fault == "refuse"
        self._fault = None
        self.recovered.set()
        if refused:
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_bind()
            self.server_activate()
            self._serve()

    def close(self) -> None:
        self.recovered.set()
        if self._fault != "refuse":
            self._stop()

    def fault(self) -> Fault | None:
        """Return the fault for the current request; None if it is answered."""
        with self.lock:
            self._answers_left -= 1
            return self._fault if self._answers_left < 0 else None

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections += 1
        return super().get_request()

    def _serve(self) -> None:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        self.bodies.append(body)
        if path == "/graphql":
            operation, variables = json.loads(body)["operationName"], json.loads(body).get("variables") or {}
            self.operations.append(operation)
            return {"data": self._graphql(operation, variables)}
        kind, *parts = path.strip("/").split("/")
        if kind == "upload":
            run, name = parts
            self.runs[run].files[unquote(name)] = body
        elif kind == "files" and parts[-1] == "file_stream":
            streams = self.runs[parts[-2]].streams
            for name, chunk in (json.loads(body).get("files") or {}).items():
                offset, lines = chunk["offset"], chunk["content"]
                streams.setdefault(name, [])[offset : offset + len(lines)] = lines
            return {"limits": {}}
        return {}

    def _graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "Viewer":
            return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], Run())
            run.upserted |= {key: value for key, value in variables.items() if value is not None}
            run.name, run.project = run.upserted.get("displayName", variables["name"]), variables["project"]
            return {"upsertBucket": {"bucket": self._bucket(variables["name"]), "inserted": True}}
        if operation == "RunResumeStatus":
            known = variables["name"] in self.runs
            return {"model": {"id": "1", "bucket": self._bucket(variables["name"])} if known else None}
        if operation == "CreateRunFiles":
            url = f"{self.url}/upload/{variables['run']}/"
            files = [{"name": name, "uploadUrl": url + quote(name, safe="")} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        history, events = (run.streams.get(f"wandb-{stream}.jsonl", []) for stream in ("history", "events"))
        return {
            "id": name, "name": name, "displayName": run.name, "config": run.upserted.get("config", "{}"),
            "project": {"id": "1", "name": run.project, "entity": {"id": "1", "name": ENTITY}},
            "wandbConfig": json.dumps(run.config.get("_wandb", {})), "summaryMetrics": json.dumps(run.summary),
            "tags": run.upserted.get("tags", []), "logLineCount": 0,
            "historyLineCount": len(history), "historyTail": json.dumps(history[-1:]),
            "eventsLineCount": len(events), "eventsTail": json.dumps(events[-1:]),
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert isinstance(self.server, WandbServer)
        fault = self.server.fault()
        if fault in ("error", "forbidden"):
            self.send_error(500 if fault == "error" else 403)
            return
        if fault is not None:
            if fault == "hang":
                self.server.recovered.wait()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
            return
        with self.server.lock:
            self.server.headers.append(dict(self.headers))
            answer = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

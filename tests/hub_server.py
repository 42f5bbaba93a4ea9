"""A Hub on 127.0.0.1: just enough of the real one's HTTP interface for the real client.

The server runs in a thread of the test's process, so a test reads ``requests`` and sets ``faults``
directly; the client runs in a :class:`Client` process, since it reads its environment on import.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from . import forked

TOKEN = "hf_of_the_tests"


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit

    def commit(self, files: dict[str, bytes]) -> str:
        before = self.commits.get(self.refs.get("main", ""), {})
        content = repr(sorted(files.items())).encode() + str(len(self.commits)).encode()
        oid = hashlib.sha1(content).hexdigest()
        self.commits[oid] = {**before, **files}
        self.refs["main"] = oid
        return oid


@dataclass
class Fault:
    """What goes wrong when a file is sent: whole responses are made from what ``alter`` gives."""

    cut: int | None = None  # close the connection after so many bytes of the file
    times: int = 10**9  # how often it is cut
    alter: Callable[[bytes], bytes] = bytes
    status: int = 200


class Hub:
    """Start with ``Hub()``, stop with ``close()``; ``url`` is its HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.large: dict[str, bytes] = {}  # SHA-256 -> content, uploaded before its commit
        self.faults: dict[str, Fault] = {}  # by the end of the path
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, folder: Path | None = None, **kwargs: Any) -> Repo:
        repo = self.repos[name] = Repo(**kwargs)
        files = sorted(folder.iterdir()) if folder else []
        repo.commit({path.name: path.read_bytes() for path in files if path.is_file()})
        return repo


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def begin(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        return path

    def repo(self, name: str) -> Repo | None:
        """The repository, or None when the refusal has been sent."""
        repo, token = self.hub.repos.get(name), self.headers.get("Authorization")
        known = token == f"Bearer {TOKEN}"
        if token and not known:
            message = "Invalid credentials in Authorization header"
            self.reply(401, X_Error_Message=message)
        elif repo is None or (repo.private and not known):
            self.reply(404 if known else 401, X_Error_Code="RepoNotFound")
        elif repo.gated and not known:
            self.reply(401, X_Error_Code="GatedRepo")
        else:
            return repo
        return None

    def do_HEAD(self) -> None:
        path = self.begin()
        name, found, rest = path.strip("/").partition("/resolve/")
        if not found:
            return self.reply(404)
        revision, _, filename = rest.partition("/")
        repo = self.repo(name)
        if repo is None:
            return None
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        content = repo.commits[commit].get(filename)
        if content is None:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        headers = {"X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if filename.endswith((".safetensors", ".bin")):
            headers["X_Linked_Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["ETag"] = headers["X_Linked_Etag"]
        else:
            blob = b"blob %d\0" % len(content) + content
            headers["ETag"] = f'"{hashlib.sha1(blob).hexdigest()}"'
        fault = next((f for end, f in self.hub.faults.items() if path.endswith(end)), Fault())
        if fault.status != 200:
            return self.reply(fault.status)
        content = fault.alter(content)
        total, start = len(content), 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content_Range"] = f"bytes {start}-{total - 1}/{total}"
        if fault.cut is None or not fault.times or self.command == "HEAD":
            return self.reply(206 if start else 200, content[start:], **headers)
        fault.times -= 1
        headers["Content_Length"] = str(total - start)
        self.reply(206 if start else 200, content[start : max(fault.cut, start)], **headers)
        self.close_connection = True
        return None

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not (path.startswith("/api/models/") and path.endswith("/refs")):
            return self.do_HEAD()
        repo = self.repo(self.begin().removeprefix("/api/models/").removesuffix("/refs"))
        if repo is not None:
            refs = [(n, f"refs/{'heads' if n == 'main' else 'tags'}/{n}") for n in repo.refs]
            rows = [{"name": n, "ref": ref, "targetCommit": repo.refs[n]} for n, ref in refs]
            kinds = {"branches": "refs/heads/", "tags": "refs/tags/"}
            self.json(
                {
                    "converts": [],
                    **{k: [r for r in rows if r["ref"].startswith(p)] for k, p in kinds.items()},
                }
            )

    def do_PUT(self) -> None:
        oid = self.begin().removeprefix("/upload/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.reply(200)

    def do_POST(self) -> None:
        path = self.begin()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            errors = card_errors(json.loads(body)["content"])
            messages = {"errors": [{"message": e} for e in errors], "warnings": []}
            return self.json(messages, 400 if errors else 200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, X_Error_Message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if asked.get("organization") == "closed":
                return self.reply(403, X_Error_Message="You don't have the rights")
            if name in self.hub.repos:
                return self.json({"url": f"{self.hub.url}/{name}"}, 409)
            self.hub.add(name, private=bool(asked.get("private")))
            return self.json({"url": f"{self.hub.url}/{name}"})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                href = f"{self.hub.url}/upload/{item['oid']}"
                item["actions"] = {"upload": {"href": href, "header": {}}}
            return self.json({"transfer": "basic", "objects": objects})
        name, verb, revision = path.removeprefix("/api/models/").rsplit("/", 2)
        repo = self.repo(name)
        if repo is None:
            return None
        if verb == "preupload":
            rows = [
                {"path": f["path"], "uploadMode": mode, "shouldIgnore": False}
                for f in json.loads(body)["files"]
                for mode in ["lfs" if f["path"].endswith(".safetensors") else "regular"]
            ]
            return self.json({"files": rows})
        if verb == "tag":
            tag = json.loads(body)["tag"]
            if tag in repo.refs:
                return self.reply(409)
            repo.refs[tag] = repo.refs.get(revision, revision)
            return self.reply(200)
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        for line in lines:
            if line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
        oid = repo.commit(files)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return self.json({"commitUrl": url, "commitOid": oid})


def card_errors(text: str) -> list[str]:
    """What the Hub would say about a card's metadata: its documented rules for model cards."""
    data = yaml.safe_load(text.split("---\n")[1])
    errors = []
    if data.get("license") not in ("apache-2.0", "mit", "other"):
        errors.append(f"license {data.get('license')} is not of the list")
    if data.get("license") == "other" and not (data.get("license_name") and data["license_link"]):
        errors.append("license other needs license_name and license_link")
    if data.get("pipeline_tag") not in ("image-feature-extraction", "image-classification"):
        errors.append(f"pipeline_tag {data.get('pipeline_tag')} is not of the list")
    for model in data.get("model-index", []):
        for result in model["results"]:
            needed = (result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"])
            if not all(isinstance(text, str) and text for text in needed):
                errors.append(f"result without task or dataset: {result}")
            for metric in result["metrics"]:
                if not isinstance(metric["value"], float) or not metric["type"]:
                    errors.append(f"metric without type or value: {metric}")
    return errors


WORKER = """
import json, os, sys, time
answers, sys.stdout = sys.stdout, sys.stderr
sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.01))  # the client's retries
import deen_zoo, timm, torch
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 65536  # so that a small file has many chunks
torch.set_num_threads(1)
space = {}
for line in sys.stdin:
    answer = {}
    try:
        space["result"] = None
        exec(json.loads(line), globals(), space)
        answer["result"] = space["result"]
    except BaseException as error:
        answer["error"] = str(error)
        answer["kind"] = [kind.__name__ for kind in type(error).__mro__]
    print(json.dumps(answer), file=answers, flush=True)
"""


class ClientError(Exception):
    """What the client's process raised; ``kind`` has the names of its classes."""

    def __init__(self, message: str, kind: list[str]):
        super().__init__(message)
        self.kind = kind


class Client:
    """A process with ``deen_zoo`` and the real Hub client; it runs code and gives ``result``."""

    def __init__(self, home: Path, **environment: str):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DEEN_ZOO_HUB"))}
        env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        # Not the client's 10 seconds: the machine may be busy.
        env |= {"HF_HUB_ETAG_TIMEOUT": "600", "HF_HUB_DOWNLOAD_TIMEOUT": "600"}
        stdin, requests = os.pipe()
        answers, stdout = os.pipe()
        self.process = forked.Program(
            "-c", WORKER, env=env | environment, stdin=stdin, stdout=stdout,
            again=("deen_zoo", "huggingface_hub", "timm", "transformers"),
        )  # fmt: skip
        os.close(stdin)
        os.close(stdout)
        self.requests, self.answers = os.fdopen(requests, "w"), os.fdopen(answers)

    def run(self, code: str) -> Any:
        print(json.dumps(code), file=self.requests, flush=True)
        line = self.answers.readline()
        assert line, self.process.said(1)
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"], answer["kind"])
        return answer["result"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.answers.close()

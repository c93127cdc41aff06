"""A stand-in for the hub on loopback, and a client of it in a process of its own.

The server answers as huggingface.co does, as far as `huggingface_hub`, transformers and `datasets` ask: status codes,
`X-Error-Code`, ETag and commit headers. What is uploaded it keeps in a folder, if it is given one. The client reads
HF_ENDPOINT when it is imported; hence its own process, in which every connection that does not go to loopback fails.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_theRightOne"  # of an account that may see everything
OUTSIDER = "hf_ofSomebodyElse"  # of an account that has asked for nothing
_URL = re.compile(
    r"/(?P<api>api/)?(?P<kind>models/|datasets/)?(?P<name>[^/]+/[^/]+)(?:/(?P<verb>[a-z-]+)(?:/(?P<rest>.*))?)?$"
)


@dataclass
class Repository:
    """A repository: the folder of each commit, and what branches and tags stand for.

    Attributes:
        access: open; gated (seen by all, read with TOKEN); private (as if absent, without TOKEN).
        faults: by file name, the status that is answered in its place, or "cut": half of it.
    """

    commits: dict[str, Path]
    refs: dict[str, str]
    access: str = "open"
    faults: dict[str, int | str] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """Serves `repositories` ("org/name", data sets "datasets/org/name") in a thread while its context is open."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, token
        self.uploads: Path | None = None  # where uploaded commits lie; None: nobody may upload

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens meanwhile."""
        self.__exit__()
        yield
        self.socket = socket.socket(self.address_family, self.socket_type)
        self.server_bind()
        self.server_activate()
        self.__enter__()

    def handle_error(self, *ignored: object) -> None:
        """A client that went away; anything else fails the client's request, which the test sees."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.0"  # a connection for each request, so that none outlives the server

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_HEAD  # noqa: N815  # as the base class calls them

    def log_message(self, *words: object) -> None:
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length) if length else b""
        url = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.server.requests.append((self.command, unquote(url.path), token))
        asked = _URL.match(url.path)
        if token not in (None, TOKEN, OUTSIDER):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if (said := self._uploaded(url.path, sent, token)) is not None:
            return self._send(json.dumps(said).encode(), "", kind="application/json")
        if asked is None:
            return self._refuse(404, "", "no such page")
        kind = asked["kind"] if asked["kind"] == "datasets/" else ""
        repository = self.server.repositories.get(kind + asked["name"])
        if repository is None or (repository.access == "private" and token != TOKEN):
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        verb, rest = asked["verb"], asked["rest"] or ""
        revision, _, path = (unquote(part) for part in rest.partition("/"))
        commit = repository.refs.get(revision or "main", revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folder = repository.commits[commit]
        if asked["api"]:
            recursive = parse_qs(url.query).get("recursive", [""])[0].lower() in ("1", "true")
            return self._describe(asked["name"], commit, folder, verb, path, sent, recursive)
        if verb != "resolve":
            return self._refuse(404, "", "no such page")
        if repository.access == "gated" and token != TOKEN:
            status, words = (403, "you are not in the authorized list") if token else (401, "you must log in")
            return self._refuse(status, "GatedRepo", f"Access to model {asked['name']} is restricted: {words}.")
        fault = repository.faults.get(path)
        if isinstance(fault, int):
            return self._refuse(fault, "", "Internal Error" if fault >= 500 else "token lacks the permission")
        if not (folder / path).is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found", commit)
        return self._send((folder / path).read_bytes(), commit, cut=fault == "cut")

    def _uploaded(self, path: str, sent: bytes, token: str | None) -> dict[str, Any] | None:
        """Take a repository to be created, or a commit of files in its body; None where neither is asked for."""
        parts = path.strip("/").split("/")
        if self.server.uploads is None or token != TOKEN or self.command != "POST" or parts[0] != "api":
            return None
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked['organization']}/{asked['name']}"
            empty = self.server.uploads / name / "0"
            empty.mkdir(parents=True)
            self.server.repositories[name] = Repository({"0" * 40: empty}, {"main": "0" * 40})
            return {"url": f"{self.server.endpoint}/{name}"}
        if len(parts) != 6 or parts[4] not in ("preupload", "commit"):
            return None
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for each in json.loads(sent)["files"]]  # fmt: skip
            return {"files": files}
        commit = hashlib.sha1(sent, usedforsecurity=False).hexdigest()
        folder = self.server.uploads / name / commit
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                (folder / line["value"]["path"]).parent.mkdir(parents=True, exist_ok=True)
                (folder / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
        self.server.repositories[name].commits[commit] = folder
        self.server.repositories[name].refs[parts[5]] = commit
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}"}

    def _describe(
        self, name: str, commit: str, folder: Path, verb: str | None, path: str, sent: bytes, recursive: bool
    ) -> None:
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        files = [
            {
                "type": "file",
                "path": name,
                "size": (folder / name).stat().st_size,
                "oid": _etag((folder / name).read_bytes()),
            }
            for name in names
        ]
        answer: Any = {"id": name, "sha": commit, "siblings": [{"rfilename": file["path"]} for file in files]}
        answer |= {"private": False, "gated": False, "tags": [], "downloads": 0}
        if verb == "tree":
            inside = [file for file in files if file["path"].startswith(f"{path}/" if path else "")]
            depth = path.count("/") + 1 if path else 0
            answer = [file for file in inside if recursive or file["path"].count("/") == depth]
            folders = {"/".join(file["path"].split("/")[: depth + 1]) for file in inside if file not in answer}
            answer += [{"type": "directory", "path": folder, "size": 0, "oid": commit} for folder in sorted(folders)]
            if path and not answer:
                return self._refuse(404, "EntryNotFound", f"{path} does not exist on {commit}", commit)
        elif verb == "paths-info":
            said = sent.decode()
            paths = json.loads(said)["paths"] if said.startswith("{") else parse_qs(said)["paths"]
            answer = [file for file in files if file["path"] in paths]
        elif verb not in (None, "revision"):
            return self._refuse(404, "", "no such page")
        self._send(json.dumps(answer).encode(), commit, kind="application/json")

    def _send(self, data: bytes, commit: str, *, kind: str = "application/octet-stream", cut: bool = False) -> None:
        start = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        part = data[int(start[1]) : int(start[2]) + 1 if start[2] else None] if start else data
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start[1]}-{int(start[1]) + len(part) - 1}/{len(data)}")
        headers = {
            "Content-Type": kind,
            "Content-Length": len(part),
            "ETag": f'"{_etag(data)}"',
            "X-Repo-Commit": commit,
        }
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part[: len(part) // 2] if cut else part)

    def _refuse(self, status: int, code: str, words: str, commit: str | None = None) -> None:
        data = json.dumps({"error": words}).encode()
        self.send_response(status)
        headers = {"X-Error-Code": code, "X-Error-Message": words, "X-Repo-Commit": commit, "Content-Length": len(data)}
        for name, value in headers.items():
            if value:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class Client:
    """secateur in a process of its own, which takes `endpoint` for the hub; see `_serve` for what may be asked."""

    def __init__(self, endpoint: str, home: Path) -> None:
        keep = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "SECATEUR_"))
        }
        environment = keep | {
            "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str, *words: object, token: str | None = None, **options: object) -> SimpleNamespace:
        """What the process answers; `error` has the name of the class of what was raised and `says` its text."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"what": what, "words": [str(word) for word in words], "options": options, "token": token}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return SimpleNamespace(**json.loads(self.process.stdout.readline()))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()  # end of its input ends it


def _only_loopback(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and arguments[1][0] != "127.0.0.1":
        raise RuntimeError(f"a test asked for {arguments[1]}")


def _serve() -> None:
    """Answer requests, a line of JSON each: `load` as in Python, `push` and `fetch` as transformers does them, `text`,
    or `run` for a command line."""
    sys.addaudithook(_only_loopback)
    answers, sys.stdout = sys.stdout, sys.stderr
    import huggingface_hub.utils._http as client
    import torch
    from huggingface_hub import file_download

    torch.set_num_threads(1)
    for module in (client, file_download):  # retries wait for half a minute
        module.time = SimpleNamespace(**vars(module.time) | {"sleep": lambda seconds: None})
    from test_cli import call
    from transformers import AutoModelForCausalLM

    import secateur
    from secateur.assets import read_text
    from secateur.errors import SecateurError

    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        if asked["token"]:
            os.environ["HF_TOKEN"] = asked["token"]
        answer: dict[str, Any] = {"error": None}
        try:
            if asked["what"] == "load":
                model = secateur.load(*asked["words"], **asked["options"])
                answer |= {
                    "source": model.source,
                    "parents": len(model.parents),
                    "tokenizer": model.tokenizer is not None,
                }
                answer |= {"fingerprint": model.fingerprint()}
            elif asked["what"] in ("push", "fetch"):
                hf = AutoModelForCausalLM.from_pretrained(asked["words"][0], **asked["options"])
                if asked["what"] == "push":
                    hf.push_to_hub(asked["words"][1])
                with torch.no_grad():
                    answer |= {"logits": hf.eval()(torch.arange(5, 15)[None]).logits.sum().item()}
            elif asked["what"] == "text":
                text = read_text(*asked["words"], purpose="evaluation")
                answer |= {"text": text.text, "facts": text.provenance}
            else:
                told = call(*asked["words"])
                answer |= {"code": told.code, "out": told.out, "err": told.err}
        except SecateurError as error:
            answer |= {"error": type(error).__name__, "says": str(error)}
        except Exception as error:
            answer |= {"error": f"untyped {type(error).__name__}", "says": traceback.format_exc()}
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()

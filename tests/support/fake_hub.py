"""The parts of the Hugging Face hub's API that a download uses, on a local server."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from support.file_server import FileServer, Request
from support.model_stores import sha256

if TYPE_CHECKING:
    from collections.abc import Callable

COMMIT = "c" * 40
_API = re.compile(r"/api/models/([^/?]+/[^/?]+)(?:/revision/([^/?]+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class FakeHub(FileServer):
    """Serves repositories; ``token`` makes them private, ``gated`` makes them ask for consent."""

    def __init__(
        self, repos: dict[str, dict[str, bytes]], *, token: str | None = None, gated: bool = False
    ) -> None:
        super().__init__({}, self.answer)
        self.repos = repos
        self.token = token
        self.gated = gated
        self.said_sha256: str | None = None  # what the hub claims, when it is wrong
        self.serve: Callable[[Request, bytes, dict[str, Any]], None] = _serve

    @property
    def weight_requests(self) -> list[dict[str, str]]:
        return [
            r
            for r in self.requests
            if r.get("method") != "HEAD" and r["path"].endswith((".gguf", ".safetensors"))
        ]

    def answer(self, request: Request) -> None:
        if self.token and request.handler.headers.get("Authorization") != f"Bearer {self.token}":
            request.send(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif self.gated:
            request.send(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif match := _API.fullmatch(request.path.partition("?")[0]):
            self._info(request, match[1], match[2] or "main")
        elif match := _FILE.fullmatch(request.path):
            self._file(request, match[1], match[2], match[3])
        else:
            request.send(404)

    def _info(self, request: Request, repo: str, revision: str) -> None:
        if repo not in self.repos:
            request.send(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return
        if revision not in ("main", COMMIT):
            request.send(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            return
        siblings: list[dict[str, Any]] = []
        for name, data in self.repos[repo].items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "b" * 40}
            if _is_large(name):
                digest = self.said_sha256 or sha256(data)
                sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        body = {
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "siblings": siblings,
        }
        request.send(200, json.dumps(body).encode(), Content_Type="application/json")

    def _file(self, request: Request, repo: str, revision: str, name: str) -> None:
        data = self.repos.get(repo, {}).get(name)
        if data is None or revision not in ("main", COMMIT):
            request.send(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            return
        digest = (self.said_sha256 or sha256(data)) if _is_large(name) else "a" * 40
        headers: dict[str, Any] = {"X_Repo_Commit": COMMIT, "ETag": f'"{digest}"', "Accept_Ranges": "bytes"}
        if request.handler.command == "HEAD":
            request.send(200, Content_Length=len(data), **headers)
            return
        self.serve(request, data, headers)


def _serve(request: Request, data: bytes, headers: dict[str, Any]) -> None:
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.handler.headers.get("Range", ""))
    if wanted is None:
        request.send(200, data, **headers)
        return
    first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
    request.send(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)


def _is_large(name: str) -> bool:
    return name.endswith((".gguf", ".safetensors"))

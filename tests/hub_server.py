"""A local server that speaks enough of the Hugging Face Hub's HTTP protocol for the real client.

    with LocalHub() as hub:
        token = hub.add_user("alice")
        hub.create("alice/bert", {"config.json": b"{}"})
        HfApi(endpoint=hub.url, token=token).model_info("alice/bert")

Everything lives in memory. Two servers are started: the hub on ``127.0.0.1`` and the file store (the "CDN" that LFS
files are redirected to) on ``localhost``: the client only drops its token when the host *name* changes. Nothing here
imports `huggingface_hub`, so the server can be started before the client's environment is settled.

Known simplifications: no Xet storage and no multipart uploads, commit ids are hashes of JSON (file ids are the real
ones), tags and search results are there at once, and download counts stay what the test sets.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import socket
import socketserver
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

import yaml

_SUFFIXES = """
    7z arrow bin ckpt gguf gz h5 joblib model msgpack npy npz onnx ot parquet pb pickle pkl pt pth safetensors tar tgz
    wasm xz zip zst
"""
LFS_SUFFIXES = tuple(_SUFFIXES.split())
LFS_SIZE = 10 * 1024 * 1024
GIT_ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
BEFORE = ("status", "drop", "delay", "flip")  # faults that act on the request
AFTER = ("truncate", "reset", "flip", "lost")  # faults that act on the answer
RELATIONS = ("adapter", "merge", "quantized", "finetune")
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())


# --- what the hub stores -------------------------------------------------------------------------------------------


class HubError(Exception):
    """An error answer; `code` becomes the X-Error-Code header, which decides the client's exception class."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message.replace("\n", " ")}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class File:
    """The content of one file, stored as a git blob or as an LFS object."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """Id of the git blob: the content itself, or the pointer that stands for an LFS object."""
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def pointer(self) -> bytes:
        """The LFS pointer file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        """The id that the client compares its own content with."""
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class User:
    """A person with one token; `orgs` maps an organization to the person's role in it."""

    name: str
    token: str
    orgs: Mapping[str, str]
    role: str

    def owns(self, namespace: str) -> bool:
        """Tell whether private repositories of `namespace` are visible."""
        return namespace == self.name or namespace in self.orgs

    def writes(self, namespace: str) -> bool:
        """Tell whether this token may write below `namespace`."""
        return self.role == "write" and (namespace == self.name or self.orgs.get(namespace, "read") != "read")


@dataclass(frozen=True)
class Commit:
    """One commit: a whole tree of files, and where it came from."""

    sha: str
    parent: str | None
    files: Mapping[str, File]
    title: str
    message: str
    author: str
    date: str


@dataclass
class Discussion:
    """A discussion or, when `base` is set, a pull request opened on top of that commit."""

    num: int
    title: str
    author: str
    date: str
    base: str | None
    status: str
    merged: str | None = None


@dataclass
class Repo:
    """A repository; `refs` maps full names (refs/heads/main, refs/tags/v1, refs/pr/1) to commits."""

    id: str
    kind: str
    private: bool
    gated: bool | str
    sdk: str | None = None
    likes: int = 0
    downloads: int = 0
    refs: dict[str, str] = field(default_factory=dict)
    log: dict[str, Commit] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    granted: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)  # LFS objects that a commit may point to

    @property
    def namespace(self) -> str:
        """The user or organization that owns the repository."""
        return self.id.partition("/")[0]

    @property
    def prefix(self) -> str:
        """What stands before the id in URLs."""
        return "" if self.kind == "model" else f"{self.kind}s/"

    def ref(self, revision: str) -> str | None:
        """Return the full name of a branch, tag or pull request; None for anything else."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        """Find the commit that a name, an id or the beginning of an id stands for."""
        if name := self.ref(revision):
            return self.log[self.refs[name]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for sha, commit in self.log.items():
                if sha.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """List the commits that lead to `revision`, newest first."""
        commits = [self.at(revision)]
        while parent := commits[-1].parent:
            commits.append(self.log[parent])
        return commits

    def add(self, ref: str, files: Mapping[str, File], title: str, message: str, author: str, date: str) -> Commit:
        """Put a commit with these files on top of `ref` (or make it the first one)."""
        parent = self.refs.get(ref)
        tree = {path: file.oid for path, file in files.items()}
        sha = hashlib.sha1(json.dumps([self.kind, self.id, parent, tree, title, date]).encode()).hexdigest()
        self.log[sha] = Commit(sha, parent, dict(files), title, message, author, date)
        self.refs[ref] = sha
        self.stored.update(file.sha256 for file in files.values() if file.lfs)
        return self.log[sha]


@dataclass
class Seen:
    """A request that arrived; `host` is "hub" or "files", `path` is decoded, `status` 0 means hung up unanswered.

    `sent` counts the bytes of the answer's body that were put on the wire, `received` those of the request's.
    """

    method: str
    path: str
    host: str
    query: str
    headers: Mapping[str, str]
    received: int
    status: int = 0
    sent: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    """Something that goes wrong with the requests that match; see `LocalHub.fault`."""

    kind: str
    path: str
    method: str
    host: str
    times: int | None
    status: int
    headers: Mapping[str, str]
    after: int | None
    seconds: float
    hits: int = 0

    def matches(self, request: Request) -> bool:
        """Tell whether this fault is still armed and meant for this request."""
        return (
            (self.times is None or self.hits < self.times)
            and self.method in ("", request.method)
            and self.host in ("", request.host)
            and re.search(self.path, request.path) is not None
        )

    def flipped(self, body: bytes) -> bytes:
        """Change one bit of one byte, the last one if the body is too short."""
        where = len(body) // 2 if self.after is None else min(self.after, len(body) - 1)
        return body[:where] + bytes([body[where] ^ 1]) + body[where + 1 :]


@dataclass
class Request:
    """One parsed HTTP request; header names are in lower case."""

    method: str
    host: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    user: User | None = None

    @property
    def raw_path(self) -> str:
        """The path as it was sent, still quoted."""
        return self.target.partition("?")[0]

    @property
    def path(self) -> str:
        """The path, unquoted."""
        return unquote(self.raw_path)

    @cached_property
    def query(self) -> dict[str, list[str]]:
        """All parameters of the URL."""
        return parse_qs(self.target.partition("?")[2])

    def one(self, name: str, default: str = "") -> str:
        """Read a parameter that is given at most once."""
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        """Read a parameter that is on or off."""
        return self.one(name).lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        """Read the body, which must be a JSON object."""
        value = json.loads(self.body or b"{}")
        if not isinstance(value, dict):
            raise HubError(400, "Expected a JSON object")
        return value


@dataclass
class Response:
    """One HTTP answer; `later` makes a body that has to be waited for while others are answered."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    later: Callable[[], bytes] | None = None


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with JSON."""
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Response(status, json.dumps(value, default=str).encode(), {**kind, **(headers or {})})


def as_file(request: Request, data: bytes, headers: Mapping[str, str]) -> Response:
    """Answer with a file or the part of it that a Range header asks for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked is None or asked[0] == "bytes=-":
        return Response(200, data, headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(len(data), int(last) + 1) if first and last else len(data)
    if start >= len(data) or start >= stop:
        return Response(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Response(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def belongs_in_lfs(path: str, size: int, sample: bytes) -> bool:
    """Choose as the hub does: known binary suffixes, large files and binary content go to LFS, empty files never."""
    return size > 0 and (path.rpartition(".")[2] in LFS_SUFFIXES or size > LFS_SIZE or b"\0" in sample)


# --- cards ---------------------------------------------------------------------------------------------------------


def front_matter(text: str) -> dict[str, Any] | None:
    """Read the YAML block at the top of a card: None if there is none, ValueError if it is not a mapping."""
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if block is None:
        return None
    try:
        value = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML metadata: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError("YAML metadata must be a mapping")
    return value or {}


def validate_card(text: str, repo_type: str = "model") -> tuple[list[str], list[str]]:
    """Return the errors and the warnings that the hub would give for a README."""
    try:
        card = front_matter(text)
    except ValueError as error:
        return [str(error)], []
    if card is None:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = list(_common_errors(card))
    if repo_type == "model":
        errors += [*_model_errors(card), *_model_index_errors(card.get("model-index", []))]
    if repo_type == "space" and card.get("sdk") not in ("gradio", "streamlit", "docker", "static"):
        errors.append('"sdk" must be one of [gradio, streamlit, docker, static]')
    return errors, []


def as_list(value: Any) -> list[Any]:
    """Leave a list as it is, make nothing an empty list and anything else a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_id(value: Any) -> bool:
    """Tell whether something looks like owner/name (or just a name, as the oldest models have), unlike a path."""
    part = r"\w(?:[\w.-]*\w)?"
    return isinstance(value, str) and re.fullmatch(rf"(?!.*(?:--|\.\.))(?:{part}/)?{part}", value) is not None


def _common_errors(card: Mapping[str, Any]) -> Iterator[str]:
    """Check the rules that hold for cards of every type."""
    for value in as_list(card.get("license")):
        if not isinstance(value, str) or value not in LICENSES:
            yield f'"license" must be one of the known identifiers, not {value!r}; use "other" with "license_name"'
    tags = card.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        yield '"tags" must be an array of strings'
    for key in ("language", "datasets", "metrics", "license_name", "license_link", "pipeline_tag", "library_name"):
        if not all(isinstance(value, str) for value in as_list(card.get(key))):
            yield f'"{key}" must be a string'


def _model_errors(card: Mapping[str, Any]) -> Iterator[str]:
    """Check the rules of model cards."""
    if card.get("base_model") == []:
        yield '"base_model" is not allowed to be empty'
    for key in ("base_model", "new_version", "datasets"):
        for value in as_list(card.get(key)):
            if not _is_id(value):
                yield f'"{key}" with value {value!r} is not valid. Use an id from https://hf.co'
    relation = card.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        yield f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]'


def _model_index_errors(index: Any) -> Iterator[str]:
    """Check the evaluation results in a model card."""
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for i, model in enumerate(index):
        if not (isinstance(model, dict) and isinstance(model.get("name"), str)):
            yield f'"model-index[{i}].name" is required'
        elif not isinstance(model.get("results"), list):
            yield f'"model-index[{i}].results" must be an array'
        else:
            for j, result in enumerate(model["results"]):
                yield from (f'"model-index[{i}].results[{j}].{problem}' for problem in _result_errors(result))


def _result_errors(result: Any) -> Iterator[str]:
    """Check one evaluation result; each text begins with the field's name and closes the quotation."""
    result = result if isinstance(result, dict) else {}
    for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
        if not (isinstance(result.get(part), dict) and isinstance(result[part].get(key), str)):
            yield f'{part}.{key}" is required'
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        yield 'metrics" must be an array that is not empty'
        return
    for k, metric in enumerate(metrics):
        if not (isinstance(metric, dict) and isinstance(metric.get("type"), str)):
            yield f'metrics[{k}].type" is required'
        elif metric.get("value") is None:
            yield f'metrics[{k}].value" is required'


def relation_of(card: Mapping[str, Any], files: Mapping[str, File]) -> str:
    """Tell how a model relates to its base models, as stated or else as the hub guesses."""
    stated = card.get("base_model_relation")
    if isinstance(stated, str):
        return stated
    if len(as_list(card.get("base_model"))) > 1:
        return "merge"
    return "adapter" if "adapter_config.json" in files else "finetune"


def library_of(card: Mapping[str, Any], files: Mapping[str, File]) -> str | None:
    """Name the library of a model, as stated or else guessed from its files."""
    if isinstance(card.get("library_name"), str):
        return card["library_name"]
    guesses = {"adapter_config.json": "peft", "config.json": "transformers"}
    return next((library for name, library in guesses.items() if name in files), None)


def tags_of(kind: str, card: Mapping[str, Any], files: Mapping[str, File]) -> list[str]:
    """Derive the tags from a card and the files, as the hub does."""
    named = {"datasets": "dataset:", "license": "license:"}
    if kind == "dataset":
        named |= {key: f"{key}:" for key in ("language", "task_categories", "task_ids", "size_categories")}
    tags: list[Any] = []
    if kind == "model":
        tags += as_list(library_of(card, files))
        tags += ["safetensors"] * any(path.endswith(".safetensors") for path in files)
        tags += as_list(_json_of(files, "config.json").get("model_type"))
        named |= {"pipeline_tag": "", "language": ""}
        for base in as_list(card.get("base_model")):
            tags += [f"base_model:{base}", f"base_model:{relation_of(card, files)}:{base}"]
        tags += ["model-index"] * bool(card.get("model-index"))
    tags += as_list(card.get("tags"))
    tags += [prefix + str(value) for key, prefix in named.items() for value in as_list(card.get(key))]
    return list(dict.fromkeys(str(tag) for tag in tags))


def _json_of(files: Mapping[str, File], path: str) -> dict[str, Any]:
    """Read a JSON file of a repository: empty if it is missing or broken."""
    try:
        value = json.loads(files[path].data)
    except (KeyError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def safetensors_header(data: bytes) -> dict[str, Any]:
    """Read the header of a safetensors file: empty if it has none."""
    try:
        (size,) = struct.unpack("<Q", data[:8])
        return json.loads(data[8 : 8 + size])
    except (struct.error, ValueError):
        return {}


def _parameters(files: Mapping[str, File]) -> dict[str, Any] | None:
    """Count parameters by dtype over the model's safetensors files."""
    counts: dict[str, int] = {}
    for path, file in files.items():
        if re.fullmatch(r"model[^/]*\.safetensors", path):
            for name, entry in safetensors_header(file.data).items():
                if name != "__metadata__":
                    size = 1
                    for length in entry["shape"]:
                        size *= length
                    counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + size
    return {"parameters": counts, "total": sum(counts.values())} if counts else None


def describe(repo: Repo, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    """Tell all that the hub tells about a repository at a commit."""
    files = commit.files
    try:
        card = front_matter(files["README.md"].data.decode("utf-8", "replace")) or {}
    except (KeyError, ValueError):
        card = {}
    newest, oldest = repo.history(commit.sha)[0], repo.history(commit.sha)[-1]
    info: dict[str, Any] = {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "likes": repo.likes,
        "downloads": repo.downloads,
        "trendingScore": repo.likes,
        "createdAt": oldest.date,
        "lastModified": newest.date,
        "tags": tags_of(repo.kind, card, files),
        "cardData": card,
        "siblings": [_sibling(path, files[path], blobs) for path in sorted(files)],
    }
    if repo.kind == "model":
        config, adapter = _json_of(files, "config.json"), _json_of(files, "adapter_config.json")
        info["modelId"] = repo.id
        info["config"] = {key: config[key] for key in ("architectures", "model_type") if key in config}
        if adapter:
            info["config"]["peft"] = {k: adapter.get(k) for k in ("base_model_name_or_path", "task_type")}
        info["library_name"] = library_of(card, files)
        info["pipeline_tag"] = card.get("pipeline_tag")
        info["model-index"] = card.get("model-index")
        info["safetensors"] = _parameters(files)
    if repo.kind == "space":
        info["sdk"] = card.get("sdk", repo.sdk)
    return {key: value for key, value in info.items() if value is not None}


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    """List a file as repository information does."""
    entry: dict[str, Any] = {"rfilename": path}
    if blobs:
        entry |= {"size": len(file.data), "blobId": file.blob_id}
        if file.lfs:
            entry["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return entry


def expanded(hub: LocalHub, info: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
    """Keep the wanted properties only, two of which are worked out here from the tags of all models."""
    bases = [tag.split(":") for tag in info["tags"] if re.fullmatch(r"base_model:\w+:.+", tag)]
    if "baseModels" in wanted and bases:
        info["baseModels"] = {"relation": bases[0][1], "models": [{"id": base} for _, _, base in bases]}
    if "childrenModelCount" in wanted:
        tags = [describe(repo, repo.at("main"))["tags"] for repo in hub.repos if repo.kind == "model"]
        counts = {name: sum(f"base_model:{name}:{info['id']}" in each for each in tags) for name in RELATIONS}
        info["childrenModelCount"] = {name: count for name, count in counts.items() if count}
    return {key: value for key, value in info.items() if key in ("id", "_id", *wanted)}


# --- the endpoints -------------------------------------------------------------------------------------------------

PATTERNS = {
    "kind": "(?P<kind>model|dataset|space)",
    "prefix": "(?P<prefix>datasets/|spaces/|)",
    "repo": "(?P<repo>[^/]+(?:/[^/]+)??)",
    "path": "(?P<path>.+)",
}
Endpoint = Callable[..., Response]
ROUTES: list[tuple[str, str, re.Pattern[str], str, Endpoint]] = []


def route(methods: str, template: str, need: str = "read", host: str = "hub") -> Callable[[Endpoint], Endpoint]:
    """Register an endpoint; `need` says what the visitor must be allowed to do with the repository in the path.

    read: see it · files: download from it · contribute: be signed in with a write token · write: own it.
    """
    pattern = re.sub(r"{(\w+)}", lambda name: PATTERNS.get(name[1], f"(?P<{name[1]}>[^/]+)"), template)

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.extend((host, method, re.compile(pattern), need, endpoint) for method in methods.split())
        return endpoint

    return register


def page(hub: LocalHub, request: Request, items: list[Any]) -> Response:
    """Answer with one page of a list and a link to the next one."""
    start = int(request.one("cursor", "0"))
    stop = start + min(hub.page_size, int(request.one("limit", str(hub.page_size))))
    headers = {}
    if stop < len(items):
        query = urlencode({**request.query, "cursor": [str(stop)]}, doseq=True)
        headers["Link"] = f'<{hub.url}{request.raw_path}?{query}>; rel="next"'
    return as_json(items[start:stop], headers=headers)


def signed_in(request: Request) -> User:
    """Return the visitor, who must have sent a token."""
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    return request.user


@route("GET", "/api/whoami-v2")
def whoami(hub: LocalHub, request: Request) -> Response:
    """Tell who the token belongs to."""
    user = signed_in(request)
    orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": role} for name, role in user.orgs.items()]
    token = {"displayName": "test", "role": user.role}
    auth = {"type": "access_token", "accessToken": token}
    return as_json({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth})


@route("GET", "/api/agent-harnesses")
def agent_harnesses(hub: LocalHub, request: Request) -> Response:
    """Tell the client, which asks once a day, that it knows of no agents."""
    return as_json({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: LocalHub, request: Request) -> Response:
    """Check a card before it is committed."""
    body = request.json()
    errors, warnings = validate_card(body["content"], body.get("repoType") or "model")
    lists = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return as_json(lists, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repo(hub: LocalHub, request: Request) -> Response:
    """Create a repository below the visitor's name or one of their organizations."""
    user, body = signed_in(request), request.json()
    name, kind = body["name"], body.get("type") or "model"
    namespace = body.get("organization") or user.name
    if not user.writes(namespace):
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    if not re.fullmatch(r"(?!.*(--|\.\.))\w[\w.-]{0,95}(?<![.-])(?<!\.git)", name):
        raise HubError(400, f"Invalid repository name: {name!r}")
    repo_id = f"{namespace}/{name}"
    url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    if hub.find(repo_id, kind):
        raise HubError(409, f"You already created this {kind} repo: {repo_id}", url=url)
    private = body.get("visibility") == "private" or bool(body.get("private"))
    hub.create(repo_id, repo_type=kind, private=private, sdk=body.get("sdk"))
    return as_json({"url": url, "name": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: LocalHub, request: Request) -> Response:
    """Delete a repository."""
    body = request.json()
    repo_id = f"{body.get('organization') or signed_in(request).name}/{body['name']}"
    repo = hub.authorized(request, body.get("type") or "model", repo_id, "write")
    hub.repos.remove(repo)
    return as_json({})


@route("PUT", "/api/{kind}s/{repo}/settings", "write")
def settings(hub: LocalHub, request: Request, repo: Repo) -> Response:
    """Change who may see the repository or download from it."""
    body = request.json()
    repo.gated = body.get("gated", repo.gated)
    repo.private = body.get("visibility", "private" if body.get("private", repo.private) else "public") == "private"
    return as_json({"private": repo.private, "gated": repo.gated})


@route("GET", "/api/{kind}s/{repo}/auth-check", "files")
@route("GET", "/api/{kind}s/{repo}/auth-check/write", "write")
def auth_check(hub: LocalHub, request: Request, repo: Repo) -> Response:
    """Say yes: only those who may get here."""
    return as_json({})


@route("GET", "/api/{kind}s")
def list_repos(hub: LocalHub, request: Request, kind: str) -> Response:
    """Search: every filter must hold; the newest or highest comes first."""
    found = []
    for repo in hub.repos:
        if repo.kind != kind or not hub.may(request.user, repo, "read"):
            continue
        info = describe(repo, repo.at("main"))
        words = request.one("search").lower().split()
        if (
            set(request.query.get("filter", [])) <= set(info["tags"])
            and request.one("author") in ("", repo.namespace)
            and all(word in repo.id.lower() for word in words)
            and request.one("pipeline_tag") in ("", info.get("pipeline_tag"))
            and ("gated" not in request.query or request.flag("gated") == bool(repo.gated))
        ):
            found.append(info)
    key = request.one("sort", "trendingScore")
    if key not in ("trendingScore", "likes", "downloads", "createdAt", "lastModified"):
        raise HubError(400, f"Invalid sort parameter: {key}")
    found.sort(key=lambda info: (info[key], info["lastModified"]), reverse=True)
    wanted, full = request.query.get("expand", []), request.flag("full")
    asked = {"siblings": full, "cardData": full or request.flag("cardData"), "config": full or request.flag("config")}
    hidden = {"safetensors", "model-index", *(key for key in asked if not asked[key])}
    shown = [
        expanded(hub, info, wanted) if wanted else {key: info[key] for key in info if key not in hidden}
        for info in found
    ]
    return page(hub, request, shown)


@route("GET", "/api/{kind}s/{repo}")
@route("GET", "/api/{kind}s/{repo}/revision/{rev}")
def repo_info(hub: LocalHub, request: Request, repo: Repo, rev: str = "main") -> Response:
    """Tell what is known about a repository, even when its files are gated."""
    info = describe(repo, repo.at(rev), request.flag("blobs"))
    wanted = request.query.get("expand", [])
    return as_json(expanded(hub, info, wanted) if wanted else info)


def last_change(repo: Repo, commit: Commit, path: str) -> Commit:
    """Find the commit that gave a file the content it has now."""
    unchanged = takewhile(lambda old: old.files.get(path) == commit.files[path], repo.history(commit.sha))
    return list(unchanged)[-1]


def tree_entries(repo: Repo, commit: Commit, expand: bool = False, xet: bool = False) -> dict[str, dict[str, Any]]:
    """List every file and every folder of a commit, by path."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        entry: dict[str, Any] = {"type": "file", "oid": file.blob_id, "size": len(file.data), "path": path}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
            if xet:
                entry["xetHash"] = file.sha256
        if expand:
            since = last_change(repo, commit, path)
            entry["lastCommit"] = {"id": since.sha, "title": since.title, "date": since.date}
        entries[path] = entry
        while "/" in path:
            path = path.rpartition("/")[0]
            oid = hashlib.sha1(f"{commit.sha}:{path}".encode()).hexdigest()
            entries.setdefault(path, {"type": "directory", "oid": oid, "size": 0, "path": path})
    return dict(sorted(entries.items()))


@route("GET", "/api/{kind}s/{repo}/tree/{rev}")
@route("GET", "/api/{kind}s/{repo}/tree/{rev}/{path}")
def tree(hub: LocalHub, request: Request, repo: Repo, rev: str, path: str = "") -> Response:
    """List a folder, with all that is below it when recursive."""
    commit = repo.at(rev)
    entries = tree_entries(repo, commit, request.flag("expand"))
    start = f"{path.rstrip('/')}/" if path else ""
    found = [entry for name, entry in entries.items() if name.startswith(start)]
    if path and not found:
        raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
    if not request.flag("recursive"):
        found = [entry for entry in found if "/" not in entry["path"][len(start) :]]
    return page(hub, request, found)


@route("POST", "/api/{kind}s/{repo}/paths-info/{rev}")
def paths_info(hub: LocalHub, request: Request, repo: Repo, rev: str) -> Response:
    """List the entries of some paths; missing ones are left out."""
    form = parse_qs(request.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    entries = tree_entries(repo, repo.at(rev), expand, xet=True)
    return as_json([entries[path] for path in form.get("paths", []) if path in entries])


@route("GET", "/api/{kind}s/{repo}/refs")
def refs(hub: LocalHub, request: Request, repo: Repo) -> Response:
    """List branches, tags and pull requests."""

    def below(start: str, name: Callable[[str], str]) -> list[dict[str, str]]:
        known = sorted(ref for ref in repo.refs if ref.startswith(start))
        return [{"name": name(ref), "ref": ref, "targetCommit": repo.refs[ref]} for ref in known]

    found = {"branches": below("refs/heads/", lambda ref: ref[11:]), "tags": below("refs/tags/", lambda ref: ref[10:])}
    return as_json({**found, "converts": [], "pullRequests": below("refs/pr/", lambda ref: ref[8:])})


@route("GET", "/api/{kind}s/{repo}/commits/{rev}")
def commits(hub: LocalHub, request: Request, repo: Repo, rev: str) -> Response:
    """List the history, newest first."""
    known = [
        {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in repo.history(rev)
    ]
    return page(hub, request, known)


@route("POST DELETE", "/api/{kind}s/{repo}/branch/{name}", "write")
@route("POST DELETE", "/api/{kind}s/{repo}/tag/{name}", "write")
def named_ref(hub: LocalHub, request: Request, repo: Repo, name: str) -> Response:
    """Create or delete a branch or a tag; only for a new tag is `name` the revision to start from."""
    body = request.json() if request.method == "POST" else {}
    kind = "tags" if "/tag/" in request.raw_path else "heads"
    ref = f"refs/{kind}/{body.get('tag', name)}"
    if request.method == "POST":
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.at(name if kind == "tags" else body.get("startingPoint", "main")).sha
    elif ref == "refs/heads/main":
        raise HubError(403, "Cannot delete the main branch")
    elif repo.refs.pop(ref, None) is None:
        raise HubError(404, f"Invalid reference: {ref}", "RevisionNotFound")
    return as_json({})


@route("GET HEAD", "/{prefix}{repo}/resolve/{rev}/{path}", "files")
def resolve(hub: LocalHub, request: Request, repo: Repo, rev: str, path: str) -> Response:
    """Download a file: from here, or from the file store when it is kept in LFS."""
    commit = repo.at(rev)
    headers = {"X-Repo-Commit": commit.sha}
    file = commit.files.get(path)
    if file is None:
        return as_json({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
    if not file.lfs:
        return as_file(request, file.data, {**headers, "ETag": f'"{file.oid}"'})
    where = f"{hub.files_url}/lfs/{file.sha256}/{quote(path)}"
    linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data)), "Location": where}
    return Response(302, b"", {**headers, **linked})


@route("GET", "/api/{kind}s/{repo}/safetensors-metadata/{path}", "files")
def safetensors_metadata(hub: LocalHub, request: Request, repo: Repo, path: str) -> Response:
    """Send the headers of all shards that an index names, in one answer."""
    files = repo.at("main").files
    if path not in files:
        raise HubError(404, "Entry not found", "EntryNotFound")
    index, folder = _json_of(files, path), path.rpartition("/")[0]
    shards = sorted({f"{folder}/{name}".lstrip("/") for name in index.pop("weight_map", {}).values()})
    return as_json({"index": index, "headers": {name: safetensors_header(files[name].data) for name in shards}})


# --- uploads -------------------------------------------------------------------------------------------------------


def allow_push(hub: LocalHub, request: Request, repo: Repo, rev: str) -> None:
    """Demand write access, except for one's own or a new pull request."""
    user, ref = signed_in(request), repo.ref(rev) or ""
    own = ref.startswith("refs/pr/") and repo.discussions[int(ref[8:]) - 1].author == user.name
    if not (request.flag("create_pr") or own or hub.may(user, repo, "write")):
        raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")


@route("POST", "/api/{kind}s/{repo}/preupload/{rev}", "contribute")
def preupload(hub: LocalHub, request: Request, repo: Repo, rev: str) -> Response:
    """Tell how each file is to be uploaded, and what the repository holds now so that equal content is left out."""
    allow_push(hub, request, repo, rev)
    known, found = repo.at(rev).files, []
    for file in request.json()["files"]:
        path = file["path"]
        lfs = belongs_in_lfs(path, file["size"], base64.b64decode(file.get("sample", "")))
        oid = known[path].oid if path in known else None
        mode = "lfs" if lfs else "regular"
        found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return as_json({"files": found})


@route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/batch", "contribute")
def lfs_batch(hub: LocalHub, request: Request, repo: Repo) -> Response:
    """Tell where to upload LFS objects; no actions for those that are already here."""
    found = []
    for item in request.json()["objects"]:
        entry = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in repo.stored:
            verify = f"{hub.url}/{repo.prefix}{repo.id}.git/info/lfs/objects/verify"
            upload = {"href": f"{hub.files_url}/upload/{item['oid']}", "header": {}}
            entry["actions"] = {"upload": upload, "verify": {"href": verify, "header": {}}}
        found.append(entry)
    return as_json({"transfer": "basic", "objects": found})


@route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/verify", "contribute")
def lfs_verify(hub: LocalHub, request: Request, repo: Repo) -> Response:
    """Accept an uploaded object if it is what it was announced to be."""
    body = request.json()
    data = hub.uploads.pop(body["oid"], b"")
    if len(data) != body["size"] or hashlib.sha256(data).hexdigest() != body["oid"]:
        raise HubError(400, f"Uploaded content does not match {body['oid']}")
    hub.blobs[body["oid"]] = data
    repo.stored.add(body["oid"])
    return as_json({})


@route("POST", "/api/{kind}s/{repo}/lfs-files/duplicate", "files")
def lfs_duplicate(hub: LocalHub, request: Request, repo: Repo) -> Response:
    """Let another repository point to objects of this one, without moving them."""
    body = request.json()
    target = hub.authorized(request, body["target"]["type"], body["target"]["name"], "contribute")
    oids = [file["sha256"] for file in body["files"]]
    target.stored.update(oid for oid in oids if oid in repo.stored)
    failed = [{"sha256": oid, "error": "not found"} for oid in oids if oid not in repo.stored]
    return as_json({"failed": failed})


@route("GET HEAD", "/lfs/{oid}/{path}", host="files")
def get_object(hub: LocalHub, request: Request, oid: str, path: str) -> Response:
    """Download from the file store."""
    if oid not in hub.blobs:
        raise HubError(404, "No such object")
    return as_file(request, hub.blobs[oid], {"ETag": f'"{oid}"'})


@route("PUT", "/upload/{oid}", host="files")
def put_object(hub: LocalHub, request: Request, oid: str) -> Response:
    """Upload to the file store; nothing is checked before `lfs_verify`."""
    hub.uploads[oid] = request.body
    return Response(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def apply_operations(hub: LocalHub, repo: Repo, files: Mapping[str, File], lines: list[dict]) -> dict[str, File]:
    """Work out the tree after the operations of a commit request."""
    tree = dict(files)
    for line in lines:
        key, value = line["key"], line["value"]
        path = value["path"]
        if path.startswith("/") or {"..", ".", "", ".git"} & set(path.rstrip("/").split("/")):
            raise HubError(400, f"Invalid path in commit: {path!r}")
        if key == "file":
            raw = value["content"]
            tree[path] = File(base64.b64decode(raw) if value.get("encoding") == "base64" else raw.encode(), False)
        elif key == "lfsFile":
            if value["oid"] not in repo.stored:
                raise HubError(400, f"LFS object {value['oid']} of {path!r} was never uploaded")
            tree[path] = File(hub.blobs[value["oid"]], True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [name for name in tree if (name.startswith(folder) if key == "deletedFolder" else name == path)]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            tree = {name: file for name, file in tree.items() if name not in gone}
        else:
            raise HubError(400, f"Unknown operation in commit: {key!r}")
    return tree


@route("POST", "/api/{kind}s/{repo}/commit/{rev}", "contribute")
def commit(hub: LocalHub, request: Request, repo: Repo, rev: str) -> Response:
    """Commit, all or nothing, to a branch or as a new pull request; refused when the stated parent is not the head."""
    allow_push(hub, request, repo, rev)
    header, *lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    title, message = header["value"]["summary"], header["value"].get("description") or ""
    create_pr, parent = request.flag("create_pr"), header["value"].get("parentCommit")
    head, ref = repo.at(parent if create_pr and parent else rev), repo.ref(rev)
    if parent and not head.sha.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = apply_operations(hub, repo, head.files, lines)
    readme = files.get("README.md")
    if readme and readme != head.files.get("README.md"):
        errors, _ = validate_card(readme.data.decode("utf-8", "replace"), repo.kind)
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    user, answer = signed_in(request), {}
    if create_pr:
        pull = open_discussion(hub, repo, title, user.name, head.sha, "open")
        ref = f"refs/pr/{pull.num}"
        answer["pullRequestUrl"] = f"{hub.url}/{repo.prefix}{repo.id}/discussions/{pull.num}"
    if ref is None:
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
    sha = repo.add(ref, files, title, message, user.name, hub.now()).sha
    url = f"{hub.url}/{repo.prefix}{repo.id}/commit/{sha}"
    return as_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": "", **answer})


# --- discussions and pull requests ---------------------------------------------------------------------------------


def open_discussion(hub: LocalHub, repo: Repo, title: str, author: str, base: str | None, status: str) -> Discussion:
    """Open a discussion, or a pull request on top of the commit `base`."""
    topic = Discussion(len(repo.discussions) + 1, title, author, hub.now(), base, status)
    repo.discussions.append(topic)
    if base:
        repo.refs[f"refs/pr/{topic.num}"] = base
    return topic


def discussion_of(repo: Repo, num: str) -> Discussion:
    """Find a discussion by its number."""
    if not num.isdigit() or not 0 < int(num) <= len(repo.discussions):
        raise HubError(404, f"No discussion {num}")
    return repo.discussions[int(num) - 1]


def changes_of(repo: Repo, topic: Discussion) -> tuple[dict[str, File | None], list[str]]:
    """List what a pull request changes (None: deletes), and which of these files main has changed meanwhile."""
    base, head, main = repo.log[topic.base or ""].files, repo.at(f"refs/pr/{topic.num}").files, repo.at("main").files
    changes = {path: head.get(path) for path in {**base, **head} if base.get(path) != head.get(path)}
    conflicts = [path for path in changes if main.get(path) not in (base.get(path), changes[path])]
    return changes, sorted(conflicts)


def discussion_json(repo: Repo, topic: Discussion) -> dict[str, Any]:
    """Describe a discussion (without its comments) as the client wants to read it."""
    entry = {"num": topic.num, "title": topic.title, "author": {"name": topic.author}, "createdAt": topic.date}
    entry |= {"status": topic.status, "repo": {"name": repo.id, "type": repo.kind}, "isPullRequest": bool(topic.base)}
    if topic.base:
        entry["changes"] = {"base": "refs/heads/main", "mergeCommitId": topic.merged}
        entry["filesWithConflicts"] = [] if topic.merged else changes_of(repo, topic)[1]
    return {**entry, "events": [], "diff": ""}


@route("GET", "/api/{kind}s/{repo}/discussions")
def list_discussions(hub: LocalHub, request: Request, repo: Repo) -> Response:
    """List all discussions, newest first, on one page."""
    known = [discussion_json(repo, topic) for topic in reversed(repo.discussions)]
    return as_json({"discussions": known, "count": len(known), "start": 0})


@route("POST", "/api/{kind}s/{repo}/discussions", "contribute")
def new_discussion(hub: LocalHub, request: Request, repo: Repo) -> Response:
    """Open a discussion or an empty pull request."""
    body, user = request.json(), signed_in(request)
    base, status = (repo.at("main").sha, "draft") if body.get("pullRequest") else (None, "open")
    return as_json({"num": open_discussion(hub, repo, body["title"], user.name, base, status).num})


@route("GET", "/api/{kind}s/{repo}/discussions/{num}")
def discussion(hub: LocalHub, request: Request, repo: Repo, num: str) -> Response:
    """Describe one discussion."""
    return as_json(discussion_json(repo, discussion_of(repo, num)))


@route("POST", "/api/{kind}s/{repo}/discussions/{num}/merge", "write")
def merge(hub: LocalHub, request: Request, repo: Repo, num: str) -> Response:
    """Bring the changes of a pull request to main."""
    topic, user = discussion_of(repo, num), signed_in(request)
    if topic.base is None or topic.merged:
        raise HubError(400, f"Discussion {num} cannot be merged")
    changes, conflicts = changes_of(repo, topic)
    if conflicts:
        raise HubError(409, f"Merge conflicts in {', '.join(conflicts)}")
    files = {path: file for path, file in {**repo.at("main").files, **changes}.items() if file is not None}
    topic.merged = repo.add("refs/heads/main", files, f"{topic.title} (#{num})", "", user.name, hub.now()).sha
    topic.status = "merged"
    return as_json({})


# --- HTTP ----------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """Read a request, let faults and endpoints act on it, write the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def log_message(self, *args: Any) -> None:
        """Stay silent; `LocalHub.requests` is the log."""

    def _serve(self) -> None:
        hub, request = self.server.hub, self._read()
        path, _, query = request.target.partition("?")
        seen = Seen(request.method, unquote(path), request.host, query, request.headers, len(request.body))
        hub.requests.append(seen)
        fault = hub.armed(request, BEFORE, request.body if request.method == "PUT" else b"")
        if fault and fault.kind == "drop":
            return self._hang_up()
        if fault and fault.kind == "delay":
            time.sleep(fault.seconds)
        if fault and fault.kind == "flip":
            request.body = fault.flipped(request.body)
        if fault and fault.kind == "status":
            response = as_json({"error": "injected fault"}, fault.status, fault.headers)
        else:
            response = hub.respond(request)
        self._answer(request, response, seen)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, request: Request, response: Response, seen: Seen) -> None:
        body = b"" if request.method == "HEAD" else response.body
        fault = self.server.hub.armed(request, AFTER, body)
        if fault and fault.kind == "lost":
            return self._hang_up()
        if fault and fault.kind == "flip":
            body = fault.flipped(body)
        cut = fault is not None and fault.kind in ("truncate", "reset")
        if fault and cut:
            body = body[: fault.after or 0]
        seen.status, seen.sent = response.status, len(body)
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value.encode("latin-1", "replace").decode("latin-1"))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        if fault and cut:
            self._hang_up(reset=fault.kind == "reset")

    def _hang_up(self, reset: bool = False) -> None:
        """Close the connection, politely or with a TCP reset (after what was sent had time to arrive)."""
        self.close_connection = True
        if reset:
            time.sleep(0.05)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _read(self) -> Request:
        headers = {name.lower(): value for name, value in self.headers.items()}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(int(headers.get("content-length", 0)))
        return Request(self.command, self.server.host, self.path, headers, body)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass


class _Server(ThreadingHTTPServer):
    """One of the two listening sockets; `host` is "hub" or "files"."""

    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: LocalHub, host: str) -> None:
        self.hub, self.host = hub, host
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), name=f"hub-{host}", daemon=True).start()

    def server_bind(self) -> None:
        """Bind without the name lookup of the base class, which can be slow."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away at any time; anything else is a defect of the server."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.hub.errors.append(traceback.format_exc())


class LocalHub:
    """The server: what is in it, what was asked of it, and what shall go wrong."""

    def __init__(self) -> None:
        """Start listening on two free ports of the loopback interface."""
        self._lock = threading.RLock()
        self.reset()
        self._servers = [_Server(self, "hub"), _Server(self, "files")]
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.files_url = f"http://localhost:{self._servers[1].server_port}"

    def reset(self) -> None:
        """Forget users, repositories, requests and faults."""
        with self._lock:
            self.users: dict[str, User] = {}  # by token
            self.repos: list[Repo] = []
            self.blobs: dict[str, bytes] = {}  # the file store, by SHA-256
            self.uploads: dict[str, bytes] = {}  # arrived, not yet verified
            self.requests: list[Seen] = []
            self.leaks: list[str] = []  # tokens that arrived at the file store
            self.errors: list[str] = []  # tracebacks of the server itself
            self.faults: list[Fault] = []
            self.page_size = 1000
            self._clock = datetime.now(UTC)

    def close(self) -> None:
        """Stop listening."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> LocalHub:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    # what is in it

    def add_user(
        self, name: str, token: str | None = None, orgs: Iterable[str] | Mapping[str, str] = (), role: str = "write"
    ) -> str:
        """Add a user and return the token; `orgs` are names, or names with the user's role (such as "read")."""
        roles = dict(orgs) if isinstance(orgs, Mapping) else dict.fromkeys(orgs, "write")
        user = User(name, token or f"hf_{name}", roles, role)
        self.users[user.token] = user
        return user.token

    def create(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | None = None,
        repo_type: str = "model",
        private: bool = False,
        gated: bool | str = False,
        sdk: str | None = None,
    ) -> str:
        """Create a repository (with .gitattributes, as the hub does), commit `files` and return the head."""
        with self._lock:
            if self.find(repo_id, repo_type):
                raise ValueError(f"{repo_type} {repo_id} exists already")
            repo = Repo(repo_id, repo_type, private, "auto" if gated is True else gated, sdk)
            first = {".gitattributes": File(GIT_ATTRIBUTES, False)}
            repo.add("refs/heads/main", first, "initial commit", "", repo.namespace, self.now())
            self.repos.append(repo)
            return self.commit(repo_id, files, repo_type=repo_type) if files else repo.refs["refs/heads/main"]

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | None = None,
        delete: Iterable[str] = (),
        repo_type: str = "model",
        branch: str = "main",
        title: str = "Upload files",
    ) -> str:
        """Commit behind the client's back (nothing is validated) and return the new head."""
        with self._lock:
            repo, ref = self.repo(repo_id, repo_type), f"refs/heads/{branch}"
            tree = {path: file for path, file in repo.at(ref).files.items() if path not in set(delete)}
            for path, content in (files or {}).items():
                data = content.encode() if isinstance(content, str) else bytes(content)
                tree[path] = File(data, belongs_in_lfs(path, len(data), data[:512]))
                if tree[path].lfs:
                    self.blobs[tree[path].sha256] = data
            return repo.add(ref, tree, title, "", repo.namespace, self.now()).sha

    def grant(self, repo_id: str, user: str, repo_type: str = "model") -> None:
        """Give a user access to the files of a gated repository."""
        self.repo(repo_id, repo_type).granted.add(user)

    def find(self, repo_id: str, repo_type: str = "model") -> Repo | None:
        """Find a repository, if there is one of this name and type."""
        return next((repo for repo in self.repos if (repo.id, repo.kind) == (repo_id, repo_type)), None)

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """Return a repository (its likes and downloads may be set); KeyError if there is none."""
        repo = self.find(repo_id, repo_type)
        if repo is None:
            raise KeyError(f"no {repo_type} {repo_id}")
        return repo

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Return the files of a repository at a revision (branch, tag, commit or "refs/pr/1")."""
        return {path: file.data for path, file in self.repo(repo_id, repo_type).at(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Return the history of a repository, newest first."""
        return self.repo(repo_id, repo_type).history(revision)

    # what was asked of it

    def seen(self, path: str = "", method: str = "", host: str = "") -> list[Seen]:
        """Return the requests whose path matches a regular expression."""
        return [
            s for s in self.requests if re.search(path, s.path) and method in ("", s.method) and host in ("", s.host)
        ]

    def downloaded(self, path: str = "") -> int:
        """Count the bytes of file content that were sent, without metadata and redirects."""
        return sum(s.sent for s in self.seen(path) if (s.host == "files" or "/resolve/" in s.path) and s.status < 300)

    # what shall go wrong

    def fault(
        self,
        kind: str,
        *,
        path: str = "",
        method: str = "",
        host: str = "",
        times: int | None = 1,
        status: int = 503,
        headers: Mapping[str, str] | None = None,
        after: int | None = None,
        seconds: float = 0.5,
    ) -> Fault:
        """Let the next `times` requests (None: all) of this method, host and path (regular expression) go wrong.

        status: answer with `status` and `headers` instead · drop: hang up before anything is done · delay: wait
        `seconds` first · truncate, reset: close the connection, or reset it, after `after` bytes of the answer's body ·
        flip: change one bit of byte `after` (default: the middle) of the answer or of an upload · lost: do what was
        asked, then hang up. truncate, reset and flip skip requests without a body to act on, such as redirects.
        `host` is "hub" or "files". The answer's `hits` counts how often it struck.
        """
        if kind not in {*BEFORE, *AFTER}:
            raise ValueError(f"unknown fault {kind!r}; known: {', '.join(dict.fromkeys(BEFORE + AFTER))}")
        self.faults.append(Fault(kind, path, method, host, times, status, headers or {}, after, seconds))
        return self.faults[-1]

    def armed(self, request: Request, kinds: tuple[str, ...], body: bytes) -> Fault | None:
        """Take the first fault of these kinds that is due now; those that act on a body need one."""
        with self._lock:
            for fault in self.faults:
                acts = body or fault.kind not in ("truncate", "reset", "flip")
                if fault.kind in kinds and acts and fault.matches(request):
                    fault.hits += 1
                    return fault
        return None

    # how it answers

    def now(self) -> str:
        """Tell the time, which moves by at least a millisecond with every call."""
        self._clock = max(self._clock + timedelta(milliseconds=1), datetime.now(UTC))
        return self._clock.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"

    def may(self, user: User | None, repo: Repo, need: str) -> bool:
        """Tell whether someone may read, download files from, contribute to or write to a repository."""
        owner = user is not None and user.owns(repo.namespace)
        if need == "write":
            return user is not None and user.writes(repo.namespace)
        if need == "contribute":
            return user is not None and user.role == "write"
        if need == "files":
            return not repo.gated or owner or (user is not None and user.name in repo.granted)
        return not repo.private or owner

    def authorized(self, request: Request, kind: str, repo_id: str, need: str) -> Repo:
        """Return the repository, if the visitor may do with it what they need to."""
        user, repo = request.user, self.find(repo_id, kind)
        denied = 401 if user is None else 403
        if repo is None or not self.may(user, repo, "read"):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if self.may(user, repo, need):
            return repo
        if need == "files":
            raise HubError(denied, f"Access to {kind} {repo_id} is restricted.", "GatedRepo")
        if user is None:  # the client takes every bare 401 of the real hub for a missing repository
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(403, "You don't have the required permissions to perform this action")

    def respond(self, request: Request) -> Response:
        """Find the endpoint and let it answer."""
        try:
            with self._lock:
                found = self._dispatch(request)
            return replace(found, body=found.later()) if found.later else found
        except HubError as error:
            return as_json(error.body, error.status, error.headers)
        except (KeyError, ValueError, TypeError, AttributeError, binascii.Error):
            self.errors.append(f"{request.method} {request.target}\n{traceback.format_exc()}")
            return as_json({"error": "the test server failed, see LocalHub.errors"}, 500)

    def _dispatch(self, request: Request) -> Response:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if request.host == "files" and token:
            self.leaks.append(token)
        elif token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        request.user = self.users.get(token)
        for host, method, pattern, need, endpoint in ROUTES:
            match = pattern.fullmatch(request.raw_path)
            if match and (host, method) == (request.host, request.method):
                values: dict[str, Any] = {name: unquote(text) for name, text in match.groupdict().items()}
                if "repo" in values:
                    kind = values.pop("kind", "") or values.pop("prefix").rstrip("s/") or "model"
                    values["repo"] = self.authorized(request, kind, values["repo"], need)
                return endpoint(self, request, **values)
        raise HubError(404, f"No such endpoint: {request.method} {request.path}")

"""What models and data sets on the Hub are called: ``owner/name[/folder][@revision]``; and the addresses of their pages."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?\Z")
SUBFOLDER = re.compile(r"^(?:/\w[\w.=+-]*)*\Z")

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
VIEWS = "tree|blob|resolve|raw|commit|commits|discussions|viewer|settings|edit"
PAGE = re.compile(
    rf"(?:datasets/)?(?P<repository>[^/]+(?:/(?!(?:{VIEWS})(?:/|$))[^/]+)?)/?"
    rf"(?:(?P<view>{VIEWS})(?:/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?)?"
)


def is_hub_id(name: str) -> bool:
    """Tell whether a name can be that of a model on the Hub: of a repository, or of a folder in one."""
    repository, _ = split_id(name)
    return bool(HUB_ID.match(repository) and SUBFOLDER.match(name.removeprefix(repository)))


def split_id(name: str) -> tuple[str, str]:
    """Return the repository of ``owner/name[/folder]``, and the folder in it."""
    parts = name.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def short_name(model: str) -> str:
    """Return the last part of an id, given as such or as an address, or of a path."""
    model = from_address(model)
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model.partition("@")[0].rsplit("/", 1)[-1]


def from_address(text: str) -> str:
    """Return the id of what the page with this address shows, as one copies it from a browser; any other text as it is.

    Of a page of files the id has their folder and, unless it is ``main``, their revision.
    """
    scheme, _, rest = text.strip().rpartition("://")
    host, _, page = rest.partition("/")
    if scheme not in ("", "http", "https") or host not in _hosts(scheme) or (not scheme and Path(text).exists()):
        return text
    found = PAGE.fullmatch(re.split(r"[?#]", page)[0].rstrip("/"))
    if not found:
        return text
    repository, view, revision, path = found.group("repository", "view", "revision", "path")
    repository = repository.removesuffix(".git")  # which no id ends with
    if view in ("discussions", "viewer", "settings"):
        return repository
    folder = (path or "") if view == "tree" else (path or "").rpartition("/")[0]
    at = "" if revision in (None, "main") else f"@{unquote(revision)}"
    return "/".join(filter(None, (repository, unquote(folder)))) + at


def _hosts(scheme: str) -> tuple[str, ...]:
    """Return the hosts that are the Hub: with a scheme, also the one that this machine is told to use (HF_ENDPOINT)."""
    if not scheme:
        return HOSTS
    from huggingface_hub import constants

    return (*HOSTS, constants.ENDPOINT.rpartition("://")[2].rstrip("/"))

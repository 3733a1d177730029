"""Where a model's files are: a local folder, or a Hub repository at one commit. Files are fetched only when asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mats_hub import __version__
from mats_hub.errors import CheckpointError, SourceError, WrongBytes
from mats_hub.hub_client import TRIES, hub_api, hub_errors, persistently
from mats_hub.hub_id import from_address, is_hub_id, split_id
from mats_hub.tensor_header import TensorHeader, check_header, read_header

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
"""Of these one says where the weights are."""

CONFIGS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Source:
    """A model's files.

    Attributes:
        spec: how the user named it.
        repo_id: the Hub id, or None for a local folder.
        commit: the Hub commit it is pinned to, or None for a local folder.
        folder: the folder the files are in, or None when they are fetched from the Hub one by one.
        subfolder: the folder of the repository that the model is in; empty where it is the repository.
        sizes: file names (POSIX, relative) and their sizes in bytes.
        digests: sha256 of the files the Hub knows it for.
        token: the token files are fetched with; None takes the one stored on this machine.
        streamed: whether weights that are not on this machine are read by range and never stored.

    """

    spec: str
    repo_id: str | None
    commit: str | None
    folder: Path | None
    sizes: dict[str, int]
    digests: dict[str, str]
    subfolder: str = ""
    token: str | bool | None = None
    streamed: bool = False

    @property
    def name(self) -> str:
        """The last part of the id or folder: what a task is called unless the user says otherwise."""
        if self.hub_id:
            return self.hub_id.rsplit("/", 1)[-1]
        return self.folder.resolve().name if self.folder else self.spec

    @property
    def hub_id(self) -> str | None:
        """``owner/name`` or ``owner/name/folder``; None for a folder on this machine."""
        return "/".join(filter(None, (self.repo_id, self.subfolder))) if self.repo_id else None

    @property
    def public_spec(self) -> str:
        """The name that may be published: ``owner/name@commit``, or a folder's last part, never a path."""
        return f"{self.hub_id}@{self.commit}" if self.repo_id else self.name

    @property
    def for_transformers(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` that say where the files are."""
        if self.folder is not None:
            return {"pretrained_model_name_or_path": self.folder}
        place = {"pretrained_model_name_or_path": self.repo_id, "subfolder": self.subfolder}
        return {**place, "revision": self.commit, "token": self.token}

    def in_repository(self, filename: str) -> str:
        """Return what one of the files is called in the repository."""
        return f"{self.subfolder}/{filename}" if self.subfolder else filename

    def path(self, filename: str) -> Path:
        """Return the local path of a file, fetching it into the Hub's cache when it is not there.

        Raises:
            SourceError: the file does not exist or cannot be fetched.

        """
        if filename not in self.sizes:
            raise SourceError(f"{self.spec!r} has no file {filename!r}; it holds: {', '.join(sorted(self.sizes)[:20])}")
        if self.folder is not None:
            return self.folder / filename
        from huggingface_hub import hf_hub_download

        assert self.repo_id is not None
        there = self.in_repository(filename)
        for _ in range(TRIES):
            fresh = filename in self.digests and not self.is_cached(filename)
            with hub_errors(self.spec):
                fetched = persistently(
                    partial(hf_hub_download, self.repo_id, there, revision=self.commit, token=self.token)
                )
                if filename in CONFIGS:
                    self._remember_revision(there)
            path = Path(fetched)
            if not fresh or file_sha256(path) == self.digests[filename]:  # the client checks only the length
                return path
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        raise WrongBytes(
            f"{self.spec!r}: {filename} came with other bytes than the Hub says it has, {TRIES} times; nothing of it was kept. "
            "Try again later, or over another connection"
        )

    def _remember_revision(self, there: str) -> None:
        """Let the cache know which commit the revision names: offline it would not find what was fetched by the commit alone."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        named = self.spec.partition("@")[2] or "main"
        known = try_to_load_from_cache(self.repo_id or "", there, revision=named)
        if named != self.commit and not (isinstance(known, str) and self.commit in Path(known).parts):
            persistently(partial(hf_hub_download, self.repo_id or "", there, revision=named, token=self.token))

    def json(self, filename: str) -> dict[str, Any]:
        """Return the JSON object in a file; an empty one when the file is not there."""
        if filename not in self.sizes:
            return {}
        try:
            content = json.loads(self.path(filename).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.spec!r}: {filename} is not valid JSON ({error}); fetch the model again"
            ) from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.spec!r}: {filename} holds a {type(content).__name__}, not an object")
        return content

    def headers(self, filename: str) -> dict[str, TensorHeader]:
        """Return the header of a safetensors file; from the Hub only the header's bytes are read."""
        if self.folder is not None or self.is_cached(filename):
            return read_header(self.path(filename), self.spec)[0]
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        try:
            with hub_errors(self.spec):
                parse = hub_api(self.token).parse_safetensors_file_metadata
                there = self.in_repository(filename)
                parsed = persistently(partial(parse, self.repo_id or "", there, revision=self.commit))
        except (SafetensorsParsingError, NotASafetensorsRepoError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.spec!r}: {filename} is not a safetensors file ({error})") from None
        raw = {
            name: {"dtype": str(info.dtype), "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for name, info in parsed.tensors.items()
        }
        return check_header(raw, None, self.spec, filename)

    def read_range(self, filename: str, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` up to `end` (excluded) of a file on the Hub.

        Raises:
            SourceError: they cannot be fetched, or the server sends whole files only.

        """
        with hub_errors(self.spec):
            return persistently(partial(self._range, filename, begin, end))

    def _range(self, filename: str, begin: int, end: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        assert self.repo_id is not None
        headers = build_hf_headers(token=self.token, library_name="mats_hub", library_version=__version__)
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(self.repo_id, self.in_repository(filename), revision=self.commit)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with http_stream_backoff("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise SourceError(f"{self.spec!r}: the server sends no parts of files; leave out --stream")
            content = response.read()
        if len(content) != end - begin:
            raise ConnectionError(f"{filename}: {len(content)} bytes came of {end - begin}")
        return content

    def is_streamed(self, filename: str) -> bool:
        """Tell whether a file is read by range: it was asked for, and the file is not on this machine anyway."""
        return self.streamed and self.folder is None and not self.is_cached(filename)

    def is_cached(self, filename: str) -> bool:
        """Tell whether a file of a Hub repository is in this machine's cache."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo_id or "", self.in_repository(filename), revision=self.commit)
        return isinstance(found, str)

    @cached_property
    def weight_files(self) -> tuple[str, ...]:
        """The safetensors files that hold the weights, from the adapter, the single file, or the index.

        Raises:
            CheckpointError: only pickles, no weights at all, or an index that names a file outside the repository.

        """
        if "adapter_config.json" in self.sizes:
            return self._require("adapter_model.safetensors", "adapter_model.bin")
        if "model.safetensors.index.json" in self.sizes and "model.safetensors" not in self.sizes:
            return tuple(sorted(set(self.weight_map("model.safetensors.index.json").values())))
        return self._require("model.safetensors", "pytorch_model.bin")

    def weight_map(self, index: str) -> dict[str, str]:
        """Return tensor → file as an index ``NAME.SUFFIX.index.json`` has them, all files being there and of that suffix.

        Raises:
            CheckpointError: it has none, or names a file that is not there or outside the repository.

        """
        found, suffix = self.json(index).get("weight_map"), index.removesuffix(".index.json").rpartition(".")[2]
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise CheckpointError(f"{self.spec!r}: {index} has no weight_map of file names")
        for filename in sorted(set(found.values())):
            if not re.fullmatch(rf"[\w][\w.-]*\.{suffix}", filename):
                raise CheckpointError(
                    f"{self.spec!r}: {index} names {filename!r}, which is not a plain file name "
                    "inside the repository; refusing to follow it. Fetch the model again from a trusted place"
                )
            if filename not in self.sizes:
                raise CheckpointError(
                    f"{self.spec!r}: {index} names {filename!r}, which is not there; the upload or download is incomplete"
                )
        return found

    def _require(self, filename: str, pickled: str) -> tuple[str, ...]:
        if filename in self.sizes:
            return (filename,)
        pickles = [
            name for name in self.sizes if name.startswith(pickled.split(".")[0]) and name.endswith((".bin", ".pt"))
        ]
        if pickles:
            raise CheckpointError(
                f"{self.spec!r} holds its weights as a pickle ({pickles[0]}), which can run code when opened. 'mats-hub convert "
                f"{self.spec}' reads tensors of it and nothing else, once; or name a revision that has safetensors, if there is "
                "one (such as OWNER/NAME@refs/pr/1), or store it again with model.save_pretrained(folder)"
            )
        inside = sorted(
            {folder for folder, _, name in (path.rpartition("/") for path in self.sizes) if name in WEIGHTS}
        )
        if inside and self.hub_id:
            raise CheckpointError(f"{self.spec!r} has models in its folders; name one: {self.hub_id}/{inside[0]}")
        held = ", ".join(sorted(self.sizes)[:10]) or "nothing"
        raise CheckpointError(f"{self.spec!r} has no {filename}; it holds: {held}")

    @property
    def fingerprint(self) -> str:
        """Sha256 over the weight files' names and sha256: the same for a folder and for its upload to the Hub."""
        # Kept, but not by `cached_property`, whose lock before Python 3.12 is one for all sources: they are hashed at once.
        if "_fingerprint" not in self.__dict__:
            whole = hashlib.sha256()
            for filename in self.weight_files:
                digest = self.digests.get(filename) or file_sha256(self.path(filename))
                whole.update(f"{filename}\0{digest}\n".encode())
            self.__dict__["_fingerprint"] = whole.hexdigest()
        return str(self.__dict__["_fingerprint"])

    @cached_property
    def front_matter(self) -> dict[str, Any]:
        """The YAML front matter of the model's README.md; empty when there is none or it is malformed."""
        import yaml

        if "README.md" not in self.sizes:
            return {}
        text = self.path("README.md").read_text(encoding="utf-8", errors="replace")
        found = re.match(r"\A﻿?---\r?\n(.*?)\r?\n---\s*(?:\r?\n|\Z)", text, re.DOTALL)
        try:
            content = yaml.safe_load(found.group(1)) if found else {}
        except yaml.YAMLError:
            return {}
        return content if isinstance(content, dict) else {}


def open_source(spec: str | Path, token: str | bool | None = None, streamed: bool = False) -> Source:
    """Open a local folder, or a Hub model ``owner/name[/folder][@revision]`` pinned to the commit its revision names now.

    Args:
        spec: the folder, or the Hub id or the address of its page.
        token: Hub token; the one stored on this machine otherwise.
        streamed: whether weights that are not on this machine are to be read by range.

    Raises:
        SourceError: there is no such folder or repository, or the Hub cannot be reached.

    """
    text = from_address(str(spec))
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _folder_source(text, folder)
    if not is_hub_id(text.partition("@")[0]) or ".." in text or folder.exists():
        raise SourceError(
            f"{text!r} is neither a folder on this machine nor a Hub id like 'owner/name', 'owner/name@revision' or "
            "'owner/name/folder'"
        )
    source = _hub_source(text, token)
    if not any(name in source.sizes for name in WEIGHTS):
        converted = converted_folder(source)
        if any((converted / name).is_file() for name in WEIGHTS):
            source = _folder_source(text, converted, source)
    return replace(source, streamed=streamed)


def converted_folder(source: Source) -> Path:
    """Return where this machine keeps safetensors of a commit that has pickles only, once they are made (`mats_hub.convert`)."""
    from huggingface_hub import constants

    name = f"{source.hub_id}@{source.commit}".replace("/", "--")
    return Path(constants.HF_ASSETS_CACHE, "mats_hub", "converted", name)


def _folder_source(spec: str, folder: Path, of: Source | None = None) -> Source:
    """Return what is in a folder, which may be what there is on this machine of a model on the Hub."""
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    here = of or Source(spec, None, None, None, {}, {})
    return replace(here, folder=folder, sizes=sizes, digests={})


def _hub_source(spec: str, token: str | bool | None) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    path, _, at = spec.partition("@")
    (repo_id, subfolder), revision = split_id(path), at or None
    try:
        with hub_errors(spec):
            info = hub_api(token).model_info(repo_id, revision=revision, files_metadata=True)
    except SourceError as error:
        if not isinstance(error.__cause__, OfflineModeIsEnabled):
            raise
        try:
            folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise error from None
        offline = Source(spec, repo_id, folder.name, folder, {}, {}, subfolder, token)
        return _folder_source(spec, folder / subfolder, offline)
    start = f"{subfolder}/" if subfolder else ""
    files = {f.rfilename.removeprefix(start): f for f in info.siblings or () if f.rfilename.startswith(start)}
    if subfolder and not files:
        folders = sorted({f.rfilename.rpartition("/")[0] for f in info.siblings or ()} - {""})
        raise SourceError(f"{spec!r}: there is no such folder in {info.id!r}; it has: {', '.join(folders) or 'none'}")
    sizes = {name: file.size or 0 for name, file in files.items()}
    digests = {name: file.lfs.sha256 for name, file in files.items() if file.lfs is not None}
    return Source(spec, info.id, info.sha, None, sizes, digests, subfolder, token)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def give_usual_mode(path: Path) -> None:
    """Give a file or folder that was made private the permissions the user's umask asks for."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)

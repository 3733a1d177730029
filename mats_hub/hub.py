"""Publishing a merged model, or an expert's statistics: one validated commit, and nothing is ever deleted."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from mats_hub.card import CARD_FILE, render_card, validate_card
from mats_hub.checkpoint import shard_names
from mats_hub.errors import HubError
from mats_hub.eval_results import eval_result_files
from mats_hub.hub_client import hub_api, hub_errors, is_connection_error
from mats_hub.hub_id import HUB_ID, is_hub_id, split_id
from mats_hub.report import REPORT_FILE, MergeReport
from mats_hub.source import Source, open_source
from mats_hub.statistics.file import STATISTICS_FILE, Statistics
from mats_hub.statistics.remote import SECTION, STATISTICS_TAG, describe_statistics
from mats_hub.statistics.storage import INDEX_ENDING


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    upload: Upload | None = None,
) -> str:
    """Publish a merged model's folder in one commit; the repository is made when it is missing.

    The card is rendered for the repository (unless it was edited by hand, then it goes as it is) and checked by the Hub
    before anything is made or sent.

    Args:
        folder: the merged model.
        repo_id: ``owner/name``, or ``name`` in one's own namespace.
        private: whether a repository that is made here is private.
        token: Hub token; the one stored on this machine otherwise.
        revision: the branch; ``main`` otherwise.
        create_pr: open a pull request instead of committing to the branch.
        message: the commit's title.
        upload: what was sent there already.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        HubError: the card is refused, the account may not write there, the branch moved, or the Hub cannot be reached.

    """
    from huggingface_hub import CommitOperationAdd

    if not HUB_ID.match(repo_id):
        raise HubError(f"{repo_id!r} is no Hub id; write 'owner/name'")
    path = Path(folder)
    report = MergeReport.from_mapping(open_source(path).json(REPORT_FILE))
    card = _card_for(path, report, repo_id)
    validate_card(card)
    api = hub_api(token)
    with hub_errors(repo_id, HubError):
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        sent = upload.finished() if upload else {}
        operations = [
            sent.get(name) or CommitOperationAdd(name, str(path / name)) for name in names if name != CARD_FILE
        ]
        operations.append(CommitOperationAdd(CARD_FILE, card.encode()))
        operations += [CommitOperationAdd(*file) for file in eval_result_files(report, token).items()]
        title = message or f"Merge {len(report.experts)} experts with {report.recipe['method']}"
        return _commit(api, created.repo_id, operations, title, revision, create_pr)


class Upload:
    """Weight files on their way to a repository while the merge goes on; `push` publishes them with the rest, in one commit.

    The repository is made when the first file is there. What fails here is sent by `push`.

    Args:
        repo_id: where to.
        private: whether a repository that is made here is private.
        token: Hub token; the one stored on this machine otherwise.

    """

    def __init__(self, repo_id: str, *, private: bool = False, token: str | bool | None = None) -> None:
        self._repo_id, self._private, self._api = repo_id, private, hub_api(token)
        self._sent: dict[str, Future[Any]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="upload")

    def add(self, path: Path) -> None:
        """Send a file that is finished, in the background; it may be moved meanwhile."""
        self._sent[path.name] = self._worker.submit(self._send, path.name, path.open("rb"))

    def _send(self, name: str, file: BinaryIO) -> Any:
        from huggingface_hub import CommitOperationAdd

        with file:
            self._api.create_repo(self._repo_id, private=self._private, exist_ok=True)
            operation = CommitOperationAdd(name, file)
            self._api.preupload_lfs_files(self._repo_id, [operation])
        return operation

    def finished(self) -> dict[str, Any]:
        """Wait, and return what was sent: name → the operation of the commit."""
        sent = {name: future.result() for name, future in self._sent.items() if not future.exception()}
        return {name: operation for name, operation in sent.items() if operation._is_uploaded}


def check_can_push(repo_id: str, token: str | bool | None = None) -> None:
    """Refuse a repository that this machine's token may not write to, before any work is done for it.

    Raises:
        HubError: the token may not write there, there is none, or the Hub cannot be reached.

    """
    if not HUB_ID.match(repo_id):
        raise HubError(f"{repo_id!r} is no Hub id; write 'owner/name'")
    from huggingface_hub import errors

    api = hub_api(token)
    with hub_errors(repo_id, HubError):
        try:
            me = api.whoami()
        except (errors.LocalTokenNotFoundError, ValueError) as error:
            raise HubError(f"{repo_id!r}: to publish there, sign in with 'hf auth login' (or set HF_TOKEN)") from error
        owner = repo_id.split("/")[0] if "/" in repo_id else me["name"]
        if api.repo_exists(repo_id):
            api.auth_check(repo_id, write=True)
        elif owner not in (me["name"], *(org["name"] for org in me.get("orgs", ()))):
            raise HubError(
                f"{repo_id!r}: you are {me['name']!r} and may not make a repository of {owner!r}; name one of your own"
            )
        elif me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(
                f"{repo_id!r}: this machine's token may only read; sign in with one that may write ('hf auth login')"
            )


def _commit(
    api: Any,
    repo_id: str,
    operations: list[Any],
    title: str,
    revision: str | None = None,
    create_pr: bool = False,
    parent: str | None = None,
) -> str:
    """Publish files in one commit and read back that they are there; return the URL of the commit or the pull request.

    An answer that got lost is told from a commit that was not made by looking, and never repeated blindly.

    Args:
        api: the Hub client.
        repo_id: where to.
        operations: the files.
        title: of the commit.
        revision: the branch; ``main`` otherwise.
        create_pr: open a pull request instead.
        parent: the commit that it has to follow; the branch's last otherwise.

    Raises:
        HubError: the branch moved meanwhile, or the Hub has other bytes than were sent.

    """
    from huggingface_hub.errors import HfHubHTTPError

    head = parent or api.repo_info(repo_id, revision=revision).sha
    failure: Exception | None = None
    try:
        commit: Any = api.create_commit(
            repo_id, operations, commit_message=title, revision=revision, create_pr=create_pr, parent_commit=head
        )
        at, url = commit.oid, str(commit.pr_url or commit.commit_url)
    except RuntimeError as error:  # of the client, when the upload of a file failed
        raise HubError(
            f"{repo_id!r}: {error} {error.__cause__ or ''} Nothing was published; push again".strip()
        ) from error
    except Exception as error:
        status = (
            error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
        )
        if create_pr or (status != 412 and not is_connection_error(error)):
            raise
        failure, at = error, api.repo_info(repo_id, revision=revision).sha
        url = f"{api.endpoint}/{repo_id}/commit/{at}"
    wrong = _differing(api, repo_id, operations, at) if failure is None or at != head else []
    if failure is not None and (at == head or wrong):
        if at == head:
            raise failure
        raise HubError(
            f"{repo_id!r}: somebody else committed to the branch meanwhile ({head[:12]} became {at[:12]}); nothing was "
            "published. Look at their commit, then push again"
        ) from failure
    if wrong:
        raise HubError(f"{repo_id!r}: the Hub has other bytes than were sent of {', '.join(wrong[:5])}; push again")
    return url


def _differing(api: Any, repo_id: str, operations: list[Any], commit: str) -> list[str]:
    """Return the files that a commit does not hold as they were to be sent."""
    there = {
        file.rfilename: file for file in api.repo_info(repo_id, revision=commit, files_metadata=True).siblings or ()
    }
    wrong = []
    for operation in operations:
        file = there.get(operation.path_in_repo)
        if file is not None and file.lfs is not None:
            same = file.lfs.sha256 == operation.upload_info.sha256.hex()
        else:
            with operation.as_file() as content:
                data = content.read()
            same = file is not None and file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        wrong += [] if same else [operation.path_in_repo]
    return wrong


def _card_for(folder: Path, report: MergeReport, repo_id: str) -> str:
    """Return the card with the repository's name in it, or the one on disk when somebody edited it."""
    figures = [file.stem for file in sorted((folder / "figures").glob("*.png"))]
    order = [name for name in ("convergence", "movement", "results") if name in figures]
    on_disk = (folder / CARD_FILE).read_text(encoding="utf-8")
    return render_card(report, order, repo_id) if on_disk == render_card(report, order) else on_disk


def push_statistics(
    path: str | Path,
    repo_id: str | None = None,
    *,
    private: bool = False,
    create_pr: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Publish a statistics file in one commit, with a section of the card that says what it is and what it is from.

    In the expert's own repository, or its folder there, it is found by whoever merges that expert; so it is in a repository of
    its own, which says whose statistics it holds. No data are sent, only sums over them.

    Args:
        path: the file, or the index of several.
        repo_id: where to; the expert's own repository when not given.
        private: whether a repository that is made here is private.
        create_pr: open a pull request instead of committing; when not given, where the repository is somebody else's.
        token: Hub token; the one stored on this machine otherwise.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        StatisticsMismatch: the repository holds other weights than the statistics were measured on.
        HubError: the card is refused, the branch moved, the account may not write there, or the Hub cannot be reached.

    """
    from huggingface_hub import CommitOperationAdd

    statistics = Statistics.load(path)
    expert = statistics.provenance.model.partition("@")[0]
    target = repo_id or expert
    if not is_hub_id(target) or "/" not in target:
        raise HubError(
            f"{Path(path).name!r} has statistics of {expert!r}, which is no model on the Hub; name a repository (OWNER/NAME)"
        )
    api = hub_api(token)
    with hub_errors(target, HubError):
        repository, folder = split_id(target)
        source = open_source(target, token) if api.repo_exists(repository) else None
        if source is not None and not _holds_weights(source):
            source = None
        if source is not None:
            statistics.check_expert(target, source.fingerprint, source.public_spec)
        card = _statistics_card(statistics, source, expert)
        validate_card(card)
        if source is None:
            api.create_repo(repository, private=private, exist_ok=True)
        if create_pr is None:
            me = api.whoami()
            create_pr = target.split("/")[0] not in (me["name"], *(org["name"] for org in me.get("orgs", ())))
        files = _statistics_files(statistics) | {CARD_FILE: card.encode()}
        operations = [CommitOperationAdd(f"{folder}/{file}".lstrip("/"), content) for file, content in files.items()]
        title = f"Statistics for merging ({', '.join(statistics.provenance.kinds)})"
        return _commit(
            api, repository, operations, title, create_pr=create_pr, parent=source.commit if source else None
        )


def _holds_weights(source: Source) -> bool:
    return any(name.startswith(("model", "adapter_model")) and name.endswith(".safetensors") for name in source.sizes)


def _statistics_files(statistics: Statistics) -> dict[str, str | bytes]:
    """Return name in the repository → path or content, under the names by which statistics are found."""
    if len(statistics.files) == 1:
        return {STATISTICS_FILE: str(statistics.files[0])}
    index, *shards = statistics.files
    stem = STATISTICS_FILE.removesuffix(".safetensors")
    names = {file.name: new for file, new in zip(shards, shard_names(len(shards), stem), strict=True)}
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] = {key: names[name] for key, name in content["weight_map"].items()}
    files: dict[str, str | bytes] = {names[file.name]: str(file) for file in shards}
    return {**files, STATISTICS_FILE + INDEX_ENDING: json.dumps(content, indent=2).encode()}


def _statistics_card(statistics: Statistics, source: Source | None, expert: str) -> str:
    """Return the expert's own card with a section on its statistics, or the card of a repository of statistics alone."""
    section = describe_statistics(statistics)
    if source is not None:
        here = CARD_FILE in source.sizes
        text = source.path(CARD_FILE).read_text(encoding="utf-8") if here else f"# {source.name}\n"
        return f"{SECTION.sub('', text).rstrip()}\n\n{section}"
    found = statistics.provenance
    content: dict[str, Any] = {
        "base_model": split_id(expert)[0] if is_hub_id(expert) and "/" in expert else None,
        "datasets": [found.dataset] if found.dataset_commit else None,
        "library_name": "mats_hub",
        "tags": [STATISTICS_TAG],
        STATISTICS_TAG: {"model": found.model, "fingerprint": found.fingerprint, "kinds": list(found.kinds)},
    }
    matter = yaml.safe_dump({key: value for key, value in content.items() if value}, sort_keys=False).rstrip()
    return f"---\n{matter}\n---\n\n# Statistics of {expert}\n\n{section}"

"""Publishing a merged model: one validated commit, and nothing is ever deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mats_hub.card import CARD_FILE, render_card, validate_card
from mats_hub.errors import HubError
from mats_hub.report import REPORT_FILE, MergeReport
from mats_hub.source import HUB_ID, hub_api, hub_errors, open_source


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
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
    validate_card(card, token)
    api = hub_api(token)
    with hub_errors(repo_id, HubError):
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [
            CommitOperationAdd(file.relative_to(path).as_posix(), str(file))
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.name != CARD_FILE
        ]
        operations.append(CommitOperationAdd(CARD_FILE, card.encode()))
        commit: Any = api.create_commit(
            created.repo_id,
            operations,
            commit_message=message or f"Merge {len(report.experts)} experts with {report.recipe['method']}",
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


def _card_for(folder: Path, report: MergeReport, repo_id: str) -> str:
    """Return the card with the repository's name in it, or the one on disk when somebody edited it."""
    figures = [file.stem for file in sorted((folder / "figures").glob("*.png"))]
    order = [name for name in ("convergence", "movement", "results") if name in figures]
    on_disk = (folder / CARD_FILE).read_text(encoding="utf-8")
    return render_card(report, order, repo_id) if on_disk == render_card(report, order) else on_disk

"""The local Hub, seen through the real client."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import LocalHub, validate_card
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.numpy import save

WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, dtype=np.float16)}
CARD = """---
license: apache-2.0
library_name: transformers
base_model: [alice/one, alice/two]
datasets: squad
tags: [mats]
language: en
---
# Hello
"""


@pytest.fixture
def alice(hub: LocalHub) -> HfApi:
    """Make a client whose owner may write to alice/ and to the organization lab/."""
    return HfApi(endpoint=hub.url, token=hub.add_user("alice", orgs=["lab"]))


@pytest.fixture
def bob(hub: LocalHub) -> HfApi:
    """Make a client of somebody else."""
    return HfApi(endpoint=hub.url, token=hub.add_user("bob"))


@pytest.fixture
def anyone(hub: LocalHub) -> HfApi:
    """Make a client without a token."""
    return HfApi(endpoint=hub.url, token=False)


def add(path: str, content: bytes = b"x") -> CommitOperationAdd:
    """Make one file of a commit."""
    return CommitOperationAdd(path, content)


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    """Read the HTTP status that an exception carries."""
    return error.value.response.status_code


# --- isolation -----------------------------------------------------------------------------------------------------


def test_client_is_isolated(hub: LocalHub, tmp_path: Path) -> None:
    assert hub.url == constants.ENDPOINT
    assert Path(constants.HF_HUB_CACHE).is_relative_to(tmp_path)
    assert not Path(constants.HF_HOME).is_relative_to(Path.home() / ".cache")
    assert constants.HF_HUB_DISABLE_XET
    assert "HF_TOKEN" not in os.environ


def test_starts_quickly() -> None:
    code = "import time; t = time.perf_counter(); import hub_server; hub = hub_server.LocalHub(); hub.close()\n"
    code += "import sys; assert 'huggingface_hub' not in sys.modules; print(time.perf_counter() - t)"
    took = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=True)
    assert float(took.stdout) < 2


def test_reset_forgets_everything(hub: LocalHub, alice: HfApi) -> None:
    hub.create("alice/m", {"a": "1"})
    alice.model_info("alice/m")
    hub.reset()
    assert (hub.repos, hub.users, hub.requests, hub.faults) == ([], {}, [], [])


# --- users ---------------------------------------------------------------------------------------------------------


def test_whoami(alice: HfApi, anyone: HfApi) -> None:
    me = alice.whoami()
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("alice", ["lab"])
    assert me["auth"]["accessToken"]["role"] == "write"
    with pytest.raises(HfHubHTTPError) as error:
        anyone.whoami(token="hf_wrong")
    assert status_of(error) == 401


def test_wrong_token_is_not_a_missing_repository(hub: LocalHub, anyone: HfApi) -> None:
    hub.create("alice/m")
    with pytest.raises(HfHubHTTPError) as error:
        anyone.model_info("alice/m", token="hf_wrong")
    assert not isinstance(error.value, RepositoryNotFoundError)


def test_agent_harnesses_is_a_dictionary(hub: LocalHub) -> None:
    assert isinstance(get_session().get(f"{hub.url}/api/agent-harnesses").json(), dict)


# --- repositories --------------------------------------------------------------------------------------------------


def test_create_and_delete_repositories(hub: LocalHub, alice: HfApi) -> None:
    assert alice.create_repo("m").repo_id == "alice/m"
    assert alice.create_repo("lab/m", private=True).repo_id == "lab/m"
    assert alice.create_repo("alice/d", repo_type="dataset").repo_type == "dataset"
    assert alice.create_repo("alice/s", repo_type="space", space_sdk="gradio").repo_type == "space"
    assert alice.create_repo("alice/m", exist_ok=True).repo_id == "alice/m"
    assert hub.repo("lab/m").private
    assert list(hub.files("alice/m")) == [".gitattributes"]
    with pytest.raises(HfHubHTTPError) as error:
        alice.create_repo("alice/m")
    assert status_of(error) == 409
    alice.delete_repo("alice/m")
    assert not alice.repo_exists("alice/m")
    alice.delete_repo("alice/m", missing_ok=True)


def test_writing_elsewhere_or_with_a_read_token_is_forbidden(hub: LocalHub, alice: HfApi, bob: HfApi) -> None:
    hub.create("alice/m")
    reader = HfApi(endpoint=hub.url, token=hub.add_user("alice", token="hf_read", role="read"))
    refused = [
        lambda: bob.create_repo("alice/n"),
        lambda: bob.create_commit("alice/m", [add("a")], commit_message="c"),
        lambda: reader.create_commit("alice/m", [add("a")], commit_message="c"),
        lambda: bob.auth_check("alice/m", write=True),
        lambda: bob.delete_repo("alice/m"),
    ]
    for call in refused:
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert status_of(error) == 403
    assert bob.create_repo("alice/m", exist_ok=True).repo_id == "alice/m"
    bob.auth_check("alice/m")
    alice.auth_check("alice/m", write=True)


def test_private_repositories_are_hidden(hub: LocalHub, alice: HfApi, bob: HfApi, anyone: HfApi) -> None:
    hub.create("alice/secret", {"config.json": "{}"}, private=True)
    for api, status in ((bob, 404), (anyone, 401)):
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info("alice/secret")
        assert status_of(error) == status
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("alice/secret", "config.json")
        assert list(api.list_models()) == []
    assert [model.id for model in alice.list_models(author="alice")] == ["alice/secret"]
    alice.update_repo_settings("alice/secret", private=False)
    assert not anyone.model_info("alice/secret").private


def test_gated_repositories_show_their_names_only(hub: LocalHub, alice: HfApi, bob: HfApi, anyone: HfApi) -> None:
    hub.create("alice/gated", {"config.json": "{}"}, gated=True)
    for api, status in ((bob, 403), (anyone, 401)):
        with pytest.raises(GatedRepoError) as error:
            api.hf_hub_download("alice/gated", "config.json")
        assert status_of(error) == status
        with pytest.raises(GatedRepoError):
            api.auth_check("alice/gated")
        assert api.model_info("alice/gated").gated == "auto"
        assert "config.json" in api.list_repo_files("alice/gated")
    hub.grant("alice/gated", "bob")
    bob.hf_hub_download("alice/gated", "config.json")
    alice.hf_hub_download("alice/gated", "config.json")


def test_missing_things_have_their_own_errors(hub: LocalHub, anyone: HfApi) -> None:
    sha = hub.create("alice/m", {"config.json": "{}"})
    for name in ("alice/none", "gpt2"):
        with pytest.raises(RepositoryNotFoundError):
            anyone.model_info(name)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(name, "config.json", token=False)
    with pytest.raises(RevisionNotFoundError):
        anyone.model_info("alice/m", revision="none")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("alice/m", "config.json", revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/m", "none.json")
    assert list(Path(constants.HF_HUB_CACHE).glob(f"*/.no_exist/{sha}/none.json"))
    assert not anyone.file_exists("alice/m", "none.json")


# --- reading -------------------------------------------------------------------------------------------------------


def test_download_one_file(hub: LocalHub) -> None:
    data = os.urandom(100_000)
    sha = hub.create("alice/m", {"config.json": '{"a": 1}', "big.bin": data})
    small, big = hf_hub_download("alice/m", "config.json"), hf_hub_download("alice/m", "big.bin", token=False)
    assert Path(small).read_text() == '{"a": 1}'
    assert Path(big).read_bytes() == data
    assert Path(small).parent.name == sha
    assert hub.downloaded("big.bin") == len(data)
    assert hub.downloaded() == len(data) + 8


def test_token_stays_at_the_hub(hub: LocalHub, alice: HfApi) -> None:
    hub.create("alice/m", {"big.bin": b"\0" * 1000}, private=True)
    alice.hf_hub_download("alice/m", "big.bin")
    snapshot_download("alice/m", token=alice.token)
    assert hub.seen("big.bin", host="files")
    assert hub.leaks == []


def test_snapshot(hub: LocalHub) -> None:
    files = {"README.md": CARD, "config.json": "{}", "sub/dir/w.safetensors": save(WEIGHTS)}
    sha = hub.create("alice/m", files)
    folder = Path(snapshot_download("alice/m", ignore_patterns=".git*"))
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(files)
    assert (folder / "sub/dir/w.safetensors").read_bytes() == save(WEIGHTS)
    hub.requests.clear()
    snapshot_download("alice/m", revision=sha, ignore_patterns=".git*")
    assert hub.requests == []


def test_datasets_and_spaces_have_their_own_names(hub: LocalHub, anyone: HfApi) -> None:
    for kind in ("model", "dataset", "space"):
        hub.create("alice/x", {"kind.txt": kind, "data.bin": kind.encode() + b"\0"}, repo_type=kind)
        path = hf_hub_download("alice/x", "kind.txt", repo_type=kind)
        assert Path(path).read_text() == kind
        assert Path(hf_hub_download("alice/x", "data.bin", repo_type=kind)).read_bytes() == kind.encode() + b"\0"
        assert "kind.txt" in anyone.list_repo_files("alice/x", repo_type=kind)
    assert [repo.id for repo in anyone.list_datasets()] == [repo.id for repo in anyone.list_spaces()] == ["alice/x"]


def test_tree_and_paths(hub: LocalHub, anyone: HfApi) -> None:
    hub.create("alice/m", {"a.txt": "1", "d/b.txt": "22", "d/e/c.bin": "333"})
    top = {item.path: type(item).__name__ for item in anyone.list_repo_tree("alice/m")}
    assert top == {".gitattributes": "RepoFile", "a.txt": "RepoFile", "d": "RepoFolder"}
    hub.page_size = 2
    below = {item.path for item in anyone.list_repo_tree("alice/m", "d", recursive=True, expand=True)}
    assert below == {"d/b.txt", "d/e", "d/e/c.bin"}
    assert len(anyone.list_repo_files("alice/m")) == 4
    (found,) = anyone.get_paths_info("alice/m", ["d/e/c.bin", "none"])
    assert (found.size, found.lfs.size, found.path) == (3, 3, "d/e/c.bin")
    with pytest.raises(EntryNotFoundError):
        list(anyone.list_repo_tree("alice/m", "none"))


def test_range_reads_transfer_only_what_is_asked(hub: LocalHub) -> None:
    data = os.urandom(1_000_000)
    sha = hub.create("alice/m", {"big.bin": data, "text.txt": "0123456789"})

    def read(name: str, span: str) -> bytes:
        return get_session().get(hf_hub_url("alice/m", name, revision=sha), headers={"Range": f"bytes={span}"}).content

    assert read("big.bin", "500-1499") == data[500:1500]
    assert read("text.txt", "3-4") == b"34"
    assert read("text.txt", "-3") == b"789"
    assert read("text.txt", "10-") == b""
    assert hub.downloaded() == 1005
    with HfFileSystem(endpoint=hub.url, token=False).open(f"alice/m@{sha}/big.bin", cache_type="none") as file:
        file.seek(10)
        assert file.read(20) == data[10:30]
    assert hub.downloaded() == 1025


def test_safetensors_headers(hub: LocalHub, anyone: HfApi) -> None:
    hub.create("alice/m", {"model.safetensors": save(WEIGHTS) + b"\0" * 500_000})
    found = anyone.get_safetensors_metadata("alice/m").files_metadata["model.safetensors"]
    assert found.tensors["a"].shape == [2, 3]
    assert anyone.parse_safetensors_file_metadata("alice/m", "model.safetensors").parameter_count == {
        "F32": 6,
        "F16": 4,
    }
    assert hub.downloaded() <= 2 * 100_001
    info = anyone.model_info("alice/m", expand=["safetensors"])
    assert (info.safetensors.total, info.sha) == (10, None)


def test_safetensors_headers_of_shards(hub: LocalHub, anyone: HfApi) -> None:
    index = '{"metadata": {"total_size": 32}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    shards = {f"model-{i}.safetensors": save({k: WEIGHTS[k]}) for i, k in ((1, "a"), (2, "b"))}
    hub.create("alice/m", {"model.safetensors.index.json": index, **shards})
    found = anyone.get_safetensors_metadata("alice/m")
    assert found.weight_map == {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    if hasattr(anyone, "get_sharded_safetensors_metadata"):
        assert anyone.get_sharded_safetensors_metadata("alice/m").files_metadata == found.files_metadata


# --- cards, tags, search -------------------------------------------------------------------------------------------


def test_info_and_tags_come_from_card_and_files(hub: LocalHub, anyone: HfApi) -> None:
    sha = hub.create(
        "alice/m", {"README.md": CARD, "config.json": '{"model_type": "bert"}', "model.safetensors": b"12"}
    )
    info = anyone.model_info("alice/m", files_metadata=True)
    assert (info.sha, info.author, info.library_name, info.config["model_type"]) == (
        sha,
        "alice",
        "transformers",
        "bert",
    )
    assert info.card_data.base_model == ["alice/one", "alice/two"]
    wanted = "transformers safetensors bert mats en license:apache-2.0 dataset:squad base_model:alice/one"
    assert {*wanted.split(), "base_model:merge:alice/one", "base_model:merge:alice/two"} <= set(info.tags)
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes["model.safetensors"] == 2
    assert next(s for s in info.siblings if s.rfilename == "model.safetensors").lfs.size == 2


@pytest.mark.parametrize(
    ("front", "files", "relation"),
    [
        ("base_model: alice/b", {}, "finetune"),
        ("base_model: alice/b", {"adapter_config.json": "{}"}, "adapter"),
        ("base_model: [alice/b, alice/c]", {}, "merge"),
        ("base_model: alice/b\nbase_model_relation: quantized", {}, "quantized"),
    ],
)
def test_relation_to_the_base_model(hub: LocalHub, anyone: HfApi, front: str, files: dict, relation: str) -> None:
    hub.create("alice/b")
    hub.create("alice/m", {"README.md": f"---\n{front}\n---\n", **files})
    assert [m.id for m in anyone.list_models(filter=f"base_model:{relation}:alice/b")] == ["alice/m"]
    base = anyone.model_info("alice/b", expand=["childrenModelCount"])
    assert base.children_model_count == {relation: 1}
    assert anyone.model_info("alice/m", expand=["baseModels"]).base_models["relation"] == relation


def test_search(hub: LocalHub, anyone: HfApi) -> None:
    for i in range(5):
        hub.create(f"alice/bert-{i}", {"README.md": f"---\ntags: [mats, {'even' if i % 2 == 0 else 'odd'}]\n---\n"})
    hub.create("lab/gpt")
    hub.repo("alice/bert-3").likes = 7
    hub.page_size = 2

    def names(**query: object) -> list[str]:
        return [model.id for model in anyone.list_models(**query)]

    assert len(names()) == 6
    assert names(filter=["mats", "odd"], sort="created_at") == ["alice/bert-3", "alice/bert-1"]
    assert names(sort="likes", limit=1) == ["alice/bert-3"]
    assert names(author="lab") == names(search="gpt") == ["lab/gpt"]
    assert len(names(search="bert", limit=3)) == 3
    assert names(filter="none") == []
    hub.commit("alice/bert-0", {"new": "1"})
    assert names(sort="last_modified", limit=1) == ["alice/bert-0"]
    full = next(iter(anyone.list_models(search="bert-1", full=True, cardData=True)))
    assert full.card_data.tags == ["mats", "odd"]
    assert next(iter(anyone.list_models(search="bert-1"))).siblings is None


def test_valid_cards() -> None:
    index = "model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d, name: D},"
    index += " metrics: [{type: accuracy, value: 0.5}]}]}]"
    assert validate_card(CARD) == ([], [])
    assert validate_card(CARD.replace("language: en", "base_model_relation: merge\n" + index)) == ([], [])
    assert validate_card("# no front matter")[1]


@pytest.mark.parametrize(
    ("front", "complaint"),
    [
        ("license: my-own", "license"),
        ("license: {mit: true}", "license"),
        ("license: [mit", "Invalid YAML"),
        ("- a list", "mapping"),
        ("base_model: 'a b/c'", "base_model"),
        ("base_model: [alice/b, 3]", "base_model"),
        ("base_model: []", "empty"),
        ("base_model: ./merged", "base_model"),
        ("base_model: /data/merged", "base_model"),
        ("license: MIT", "license"),
        ("datasets: [squad, 1]", "datasets"),
        ("base_model_relation: blend", "base_model_relation"),
        ("tags: mats", "tags"),
        ("tags: [1, 2]", "tags"),
        ("model-index: 3", "model-index"),
        ("model-index: [{results: []}]", "name"),
        ("model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d}}]}]", "dataset.name"),
        ("model-index: [{name: m, results: [{metrics: [{type: accuracy}]}]}]", "value"),
    ],
)
def test_invalid_cards(front: str, complaint: str) -> None:
    errors, _ = validate_card(f"---\n{front}\n---\ntext")
    assert any(complaint in error for error in errors)


def test_invalid_cards_are_refused(hub: LocalHub, alice: HfApi) -> None:
    hub.create("alice/m")
    bad = CARD.replace("apache-2.0", "nonsense")
    with pytest.raises((ValueError, BadRequestError)):
        alice.upload_file(repo_id="alice/m", path_in_repo="README.md", path_or_fileobj=bad.encode())
    assert "README.md" not in hub.files("alice/m")
    alice.upload_file(repo_id="alice/m", path_in_repo="README.md", path_or_fileobj=CARD.encode())
    assert ModelCard.load("alice/m").data.license == "apache-2.0"


# --- writing -------------------------------------------------------------------------------------------------------


def test_commit_adds_copies_and_deletes(hub: LocalHub, alice: HfApi) -> None:
    parent = hub.create("alice/m", {"old.txt": "1", "dir/a": "2", "dir/b": "3", "w.bin": "weights"})
    operations = [
        add("config.json", b"{}"),
        add("new.safetensors", save(WEIGHTS)),
        CommitOperationCopy("w.bin", "copy.bin"),
        CommitOperationDelete("old.txt"),
        CommitOperationDelete("dir/"),
    ]
    done = alice.create_commit("alice/m", operations, commit_message="t", commit_description="d", parent_commit=parent)
    files = hub.files("alice/m")
    assert set(files) == {".gitattributes", "config.json", "new.safetensors", "w.bin", "copy.bin"}
    assert (files["new.safetensors"], files["copy.bin"]) == (save(WEIGHTS), b"weights")
    assert (done.oid, done.commit_url) == (hub.commits("alice/m")[0].sha, f"{hub.url}/alice/m/commit/{done.oid}")
    newest = alice.list_repo_commits("alice/m")[0]
    assert (newest.title, newest.message, newest.authors) == ("t", "d", ["alice"])
    assert hub.commits("alice/m")[0].parent == parent
    with pytest.raises(EntryNotFoundError):
        alice.delete_file("old.txt", "alice/m")


def test_stale_parent_is_refused(hub: LocalHub, alice: HfApi) -> None:
    parent = hub.create("alice/m", {"a": "1"})
    head = hub.commit("alice/m", {"a": "2"})
    with pytest.raises(HfHubHTTPError) as error:
        alice.create_commit("alice/m", [add("b")], commit_message="c", parent_commit=parent)
    assert status_of(error) == 412
    assert hub.commits("alice/m")[0].sha == head


def test_unchanged_content_is_not_sent_again(hub: LocalHub, alice: HfApi, tmp_path: Path) -> None:
    hub.create("alice/m")
    (tmp_path / "up/sub").mkdir(parents=True)
    (tmp_path / "up/config.json").write_text("{}")
    (tmp_path / "up/sub/w.safetensors").write_bytes(save(WEIGHTS))
    for expected in (2, 2):
        alice.upload_folder(repo_id="alice/m", folder_path=tmp_path / "up")
        assert len(hub.commits("alice/m")) == expected
    assert len(hub.seen(method="PUT", host="files")) == 1


def test_stored_objects_are_not_uploaded_again(hub: LocalHub, alice: HfApi) -> None:
    hub.create("alice/m", {"a.bin": "weights"})
    alice.create_commit("alice/m", [add("b.bin", b"weights")], commit_message="c")
    assert hub.files("alice/m")["b.bin"] == b"weights"
    assert hub.seen(method="PUT") == []


def test_preuploaded_files_then_one_commit(hub: LocalHub, alice: HfApi) -> None:
    hub.create("alice/m")
    shard = add("model.safetensors", save(WEIGHTS))
    alice.preupload_lfs_files("alice/m", [shard])
    assert len(hub.commits("alice/m")) == 1
    alice.create_commit("alice/m", [shard, add("config.json", b"{}")], commit_message="c")
    assert hub.files("alice/m")["model.safetensors"] == save(WEIGHTS)
    assert len(hub.commits("alice/m")) == 2


@pytest.mark.skipif(
    "src_repo_id" not in CommitOperationCopy.__dataclass_fields__, reason="this client copies within one repository"
)
def test_copy_between_repositories_moves_no_content(hub: LocalHub, alice: HfApi) -> None:
    hub.create("bob/base", {"w.safetensors": b"w" * 100_000})
    hub.create("alice/m")
    copy = CommitOperationCopy("w.safetensors", "base.safetensors", src_repo_id="bob/base", src_repo_type="model")
    alice.create_commit("alice/m", [copy], commit_message="c")
    assert hub.files("alice/m")["base.safetensors"] == b"w" * 100_000
    assert sum(s.sent + s.received for s in hub.requests) < 5000


def test_branches_and_tags(hub: LocalHub, alice: HfApi) -> None:
    first = hub.create("alice/m", {"a": "1"})
    alice.create_branch("alice/m", branch="feature/x")
    alice.create_tag("alice/m", tag="v1")
    done = alice.create_commit("alice/m", [add("a", b"2")], commit_message="c", revision="feature/x")
    assert hub.files("alice/m")["a"] == b"1"
    assert hub.files("alice/m", "feature/x")["a"] == b"2"
    refs = alice.list_repo_refs("alice/m")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "feature/x": done.oid}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    assert Path(hf_hub_download("alice/m", "a", revision="feature/x")).read_text() == "2"
    assert alice.model_info("alice/m", revision=done.oid[:8]).sha == done.oid
    alice.create_branch("alice/m", branch="feature/x", exist_ok=True)
    with pytest.raises(HfHubHTTPError) as error:
        alice.create_tag("alice/m", tag="v1")
    assert status_of(error) == 409
    alice.delete_branch("alice/m", branch="feature/x")
    alice.delete_tag("alice/m", tag="v1")
    assert list(hub.repo("alice/m").refs) == ["refs/heads/main"]


def test_pull_request_of_a_stranger(hub: LocalHub, alice: HfApi, bob: HfApi) -> None:
    hub.create("alice/m", {"a": "1"})
    done = bob.create_commit("alice/m", [add("b.bin", b"new")], commit_message="Better", create_pr=True)
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert done.pr_url == f"{hub.url}/alice/m/discussions/1"
    assert "b.bin" not in hub.files("alice/m")
    assert hub.files("alice/m", "refs/pr/1")["b.bin"] == b"new"
    bob.create_commit("alice/m", [add("c")], commit_message="More", revision="refs/pr/1")
    assert Path(bob.hf_hub_download("alice/m", "c", revision="refs/pr/1")).read_bytes() == b"x"
    with pytest.raises(HfHubHTTPError) as error:
        bob.merge_pull_request("alice/m", 1)
    assert status_of(error) == 403
    hub.commit("alice/m", {"a": "2"})
    alice.merge_pull_request("alice/m", 1)
    assert {"a": b"2", "b.bin": b"new", "c": b"x"}.items() <= hub.files("alice/m").items()
    details = alice.get_discussion_details("alice/m", 1)
    assert (details.status, details.merge_commit_oid) == ("merged", hub.commits("alice/m")[0].sha)


def test_pull_request_with_conflict(hub: LocalHub, alice: HfApi) -> None:
    parent = hub.create("alice/m", {"a": "1"})
    hub.commit("alice/m", {"a": "2"})
    alice.create_commit("alice/m", [add("a", b"3")], commit_message="c", create_pr=True, parent_commit=parent)
    empty = alice.create_pull_request("alice/m", title="Empty")
    assert (empty.num, empty.status, empty.is_pull_request) == (2, "draft", True)
    assert alice.get_discussion_details("alice/m", 1).conflicting_files == ["a"]
    assert [topic.title for topic in alice.get_repo_discussions("alice/m")] == ["Empty", "c"]
    with pytest.raises(HfHubHTTPError) as error:
        alice.merge_pull_request("alice/m", 1)
    assert status_of(error) == 409


# --- faults --------------------------------------------------------------------------------------------------------


def test_the_client_waits_when_told_to(hub: LocalHub, anyone: HfApi) -> None:
    hub.create("alice/m")
    down = hub.fault("status", path="/resolve/", method="HEAD", status=503)
    busy = hub.fault("status", path="/resolve/", method="GET", status=429, headers={"Retry-After": "7"})
    anyone.hf_hub_download("alice/m", ".gitattributes")
    assert (down.hits, busy.hits) == (1, 1)
    hub.fault("status", path="/tree/", status=500, times=None)
    with pytest.raises(HfHubHTTPError):
        anyone.list_repo_files("alice/m")


def test_dropped_and_delayed_requests(hub: LocalHub, anyone: HfApi) -> None:
    hub.create("alice/m", {"a": "1"})
    hub.fault("drop", path="/resolve/", method="GET")
    assert Path(anyone.hf_hub_download("alice/m", "a")).read_text() == "1"
    hub.fault("delay", path="/api/models/alice/m$", seconds=2)
    with pytest.raises(Exception, match="timed out"):
        anyone.model_info("alice/m", timeout=0.1)
    assert [s.status for s in hub.seen("/resolve/", method="GET")] == [0, 200]


def test_cut_downloads(hub: LocalHub, anyone: HfApi) -> None:
    data = os.urandom(50_000)
    hub.create("alice/m", {"w.bin": data})
    cut = hub.fault("truncate", path="w.bin", after=1000)
    assert Path(anyone.hf_hub_download("alice/m", "w.bin")).read_bytes() == data
    assert (cut.hits, hub.downloaded("w.bin")) == (1, 51_000)
    reset = hub.fault("reset", path="w.bin", after=1000)
    with pytest.raises(Exception, match=r"(?i)reset"):
        anyone.hf_hub_download("alice/m", "w.bin", force_download=True)
    assert reset.hits == 1


def test_flipped_download_is_not_noticed_by_the_client(hub: LocalHub, anyone: HfApi) -> None:
    data = bytes(1000)
    hub.create("alice/m", {"w.bin": data})
    hub.fault("flip", path="w.bin", host="files", after=3)
    got = Path(anyone.hf_hub_download("alice/m", "w.bin")).read_bytes()
    assert got == data[:3] + b"\1" + data[4:]
    assert anyone.verify_repo_checksums("alice/m").mismatches
    beyond = hub.fault("flip", path=".gitattributes", after=10**9)
    assert Path(anyone.hf_hub_download("alice/m", ".gitattributes")).read_bytes()[-1] == ord("\n") ^ 1
    assert beyond.hits == 1


def test_flipped_upload_is_noticed_by_the_hub(hub: LocalHub, alice: HfApi) -> None:
    hub.create("alice/m")
    flip = hub.fault("flip", method="PUT", host="files")
    with pytest.raises(RuntimeError) as error:
        alice.create_commit("alice/m", [add("w.bin", b"weights")], commit_message="c")
    assert isinstance(error.value.__cause__, BadRequestError)
    assert flip.hits == 1
    assert "w.bin" not in hub.files("alice/m")


def test_lost_answer_to_a_commit(hub: LocalHub, alice: HfApi) -> None:
    hub.create("alice/m")
    hub.fault("lost", path="/commit/main", method="POST")
    with pytest.raises(Exception, match="disconnected"):
        alice.create_commit("alice/m", [add("a")], commit_message="c")
    assert hub.files("alice/m")["a"] == b"x"
    again = alice.create_commit("alice/m", [add("a")], commit_message="c")
    assert again.oid == hub.commits("alice/m")[0].sha
    assert len(hub.commits("alice/m")) == 2


def test_unknown_fault(hub: LocalHub) -> None:
    with pytest.raises(ValueError, match="known: status, drop"):
        hub.fault("explode")

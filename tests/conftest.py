"""Keep the tests away from the real Hub, the user's caches and the user's tokens.

`huggingface_hub` copies its settings from the environment when it is imported, and so do the libraries that import it:
the local server is started and the environment settled here, before anything else is imported.
"""

import atexit
import os
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import LocalHub

assert "huggingface_hub" not in sys.modules, "huggingface_hub was imported before its environment could be set"

_HOME = tempfile.mkdtemp(prefix="hub-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
_SERVER = LocalHub()
_FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "OAUTH_", "SPACE_")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "no_proxy")

for _name in list(os.environ):
    if _name.startswith(_FOREIGN) or _name.lower() in _PROXIES:
        del os.environ[_name]
os.environ.update(
    HF_ENDPOINT=_SERVER.url,
    HF_HOME=f"{_HOME}/huggingface",
    HF_DATASETS_CACHE=f"{_HOME}/datasets",
    XDG_CACHE_HOME=f"{_HOME}/cache",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    NO_PROXY="127.0.0.1,localhost",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # the tests run on all cores, one process each
)

LONGEST = ("test_page.py", "test_statistics.py", "test_adapter_output.py", "test_demo.py", "test_jobs.py")
"""Files that take longest: they begin first, so that no process is left alone with one in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def hub_server() -> Iterator[LocalHub]:
    """Hand out the server that HF_ENDPOINT points to."""
    yield _SERVER
    _SERVER.close()


@pytest.fixture
def hub(hub_server: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Empty the server and the client's cache, and let the client retry without waiting."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    patient = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(_http, "time", patient)
    monkeypatch.setattr(file_download, "time", patient)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    hub_server.reset()
    yield hub_server
    assert not hub_server.errors, f"the server itself failed: {hub_server.errors[0]}"
    assert not hub_server.leaks, "a token was sent to the file store"

"""Statistics on the Hub: where they are looked for, and the words that go with them."""

from __future__ import annotations

import re
from typing import Any

from mats_hub.errors import MatsError
from mats_hub.hub_client import hub_api, hub_errors
from mats_hub.source import Source, open_source
from mats_hub.statistics.file import STATISTICS_FILE, Statistics
from mats_hub.statistics.storage import INDEX_ENDING

STATISTICS_TAG = "mats_statistics"
"""Tag, and key of the front matter, by which a repository says that it holds statistics of another one's weights."""

SECTION = re.compile(r"\n*<!-- mats_statistics -->.*?<!-- /mats_statistics -->\n*", re.DOTALL)
SEARCH_LIMIT = 20


def statistics_in(source: Source) -> Statistics | None:
    """Return the statistics in a folder or repository, or None where there are none."""
    name = next((n for n in (STATISTICS_FILE, STATISTICS_FILE + INDEX_ENDING) if n in source.sizes), None)
    return Statistics.load(source.path(name), source.path) if name else None


def find_statistics(source: Source) -> tuple[Statistics | None, str]:
    """Return an expert's statistics and where they were found.

    They are looked for beside the expert; for one on the Hub then in repositories that say they hold statistics of it, the
    most liked first, of which one is taken only if it says that they are of the very same weights.
    """
    found = statistics_in(source)
    if found is not None or source.repo_id is None:
        return found, source.public_spec
    try:
        with hub_errors(source.spec):
            tags = [STATISTICS_TAG, f"base_model:{source.repo_id}"]
            listed = hub_api(source.token).list_models(filter=tags, sort="likes", cardData=True, limit=SEARCH_LIMIT)
            candidates = [(info.id, _declared(info)) for info in listed]
    except MatsError:  # offline, or the Hub cannot be searched: then there are none
        return None, ""
    for repo_id, declared in candidates:
        if declared == source.fingerprint:
            other = open_source(repo_id, source.token)
            return statistics_in(other), other.public_spec
    return None, ""


def _declared(info: Any) -> str | None:
    """Return the fingerprint of the weights that a repository says it has statistics of."""
    content = info.card_data.to_dict() if info.card_data else {}
    block = content.get(STATISTICS_TAG)
    return block.get("fingerprint") if isinstance(block, dict) else None


def describe_statistics(statistics: Statistics) -> str:
    """Return the section of a card that says what statistics are, what they are from and what they can reveal."""
    found = statistics.provenance
    data = (
        f"[{found.dataset}](https://huggingface.co/datasets/{found.dataset})" if found.dataset_commit else found.dataset
    )
    at = f" at `{found.dataset_commit}`" if found.dataset_commit else ""
    split = ", ".join(part for part in (found.dataset_config, found.dataset_split) if part)
    labels = {
        "data": "of the data (empirical Fisher)", "model": "drawn from the model's predictions (true Fisher)", "none": "not used"
    }  # fmt: skip
    sketched = f"\n| sketched | rank {found.sketch_rank} |" if found.sketch_rank else ""
    return f"""<!-- mats_statistics -->
## Statistics for merging

With `{STATISTICS_FILE}` this model can be merged with others fine-tuned from the same base, without its training data
(RegMean, Fisher merging, MaTS):

```sh
pip install mats-hub
mats-hub merge {found.model.partition("@")[0]} ANOTHER/MODEL --base ITS/BASE --output merged/
```

| | |
|---|---|
| kinds | {", ".join(found.kinds)} |
| of the weights | `{found.model}`, fingerprint `{found.fingerprint[:16]}` |
| measured on | {data}{at}{f" ({split})" if split else ""} |
| examples, tokens | {found.examples}, {found.tokens} |
| labels | {labels.get(found.label_source, found.label_source)} |
| run in | {found.dtype} |{sketched}
| made with | mats_hub {found.library_version} |

They are sums over all examples: second moments of what each layer reads and of the gradients it gets, and how often each
token was looked up. They hold no example, but the frequencies do show which tokens occur in the data.
<!-- /mats_statistics -->
"""

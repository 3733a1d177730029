"""The model card of a merge: front matter the Hub understands, and a text from which the merge can be repeated."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from mats_hub.errors import HubError
from mats_hub.figures import draw_figures
from mats_hub.methods import METHODS
from mats_hub.plan import human_bytes
from mats_hub.recipe import RECIPE_FILE
from mats_hub.report import MERGED, REPORT_FILE, MergeReport, TensorRecord

CARD_FILE = "README.md"
TEMPLATE_FILE = "model_card_template.md"
MERGE_TAG = "mats_hub"
"""Tag, and key of the front matter, by which a repository says that it is a merge of this package."""

PIPELINE_TAGS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
}


SENTENCES = "sentence-transformers"
"""The library that models of sentences are used with, and shown with on the Hub."""


def write_card(report: MergeReport, folder: Path) -> None:
    """Draw the figures and write README.md into a merged model's folder."""
    figures = draw_figures(report, folder / "figures")
    (folder / CARD_FILE).write_text(render_card(report, figures), encoding="utf-8")


def render_card(report: MergeReport, figures: Iterable[str] = (), repo_id: str | None = None) -> str:
    """Return the card's text.

    Args:
        report: what the merge did.
        figures: the names of the figures that were drawn.
        repo_id: the repository it will be in, when that is known.

    """
    return str(_template().render(**_values(report, list(figures), repo_id))).rstrip() + "\n"


def front_matter(report: MergeReport, repo_id: str | None = None) -> dict[str, Any]:
    """Return the card's metadata: Hub ids only, no empty lists, a licence only when all parents agree."""
    parents = [expert["repo_id"] for expert in report.experts if expert["repo_id"]]
    licenses, _ = _licenses(report)
    datasets = [
        s["dataset"] for s in (expert["statistics"] for expert in report.experts) if s and s.get("dataset_commit")
    ]
    content: dict[str, Any] = {
        "library_name": _library(report),
        "base_model": list(dict.fromkeys(parents)),
        "base_model_relation": "merge",
        "pipeline_tag": _pipeline_tag(report),
        "license": licenses,
        "datasets": list(dict.fromkeys(datasets)),
        "tags": list(dict.fromkeys(["merge", "mats", MERGE_TAG, report.recipe["method"]])),
    }
    if report.bundle:
        content["library_name"] = MERGE_TAG
        content["tags"].insert(0, "compressed")
    if report.recipe["output"]["format"] == "adapter":
        base = report.base and report.base["repo_id"]
        content.update(library_name="peft", base_model=base, base_model_relation="adapter" if base else None)
        content["tags"].insert(0, "lora" if _cut_records(report) else "ia3")
    elif not parents:
        del content["base_model_relation"]
    base, block = report.base and report.base["repo_id"], {"method": report.recipe["method"]}
    block |= {"base": base} if base else {}
    content[MERGE_TAG] = block | ({"experts": list(dict.fromkeys(parents))} if parents else {})
    content["model-index"] = _model_index(report, repo_id)
    return {key: value for key, value in content.items() if value}


def validate_card(text: str) -> None:
    """Have the Hub check a card's front matter.

    Raises:
        HubError: the Hub finds a fault in it, or cannot be reached.

    """
    from huggingface_hub import ModelCard, constants
    from huggingface_hub.utils import get_session

    from mats_hub.hub_client import hub_errors

    found = ""
    with hub_errors("the model card", HubError):
        try:
            ModelCard(text, ignore_metadata_errors=False)
            # Not ModelCard.validate, which in 1.x asks the public Hub whatever HF_ENDPOINT says.
            answer = get_session().post(
                f"{constants.ENDPOINT}/api/validate-yaml", json={"content": text, "repoType": "model"}
            )
            if answer.status_code >= 500:
                raise HubError(
                    f"the model card cannot be checked: the Hub answered {answer.status_code}; try again later"
                )
            found = "; ".join(str(error["message"]) for error in answer.json().get("errors") or ())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            found = str(error)
    if found:
        raise HubError(f"the Hub refuses the model card: {found}. Mend the front matter of {CARD_FILE}")


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(cell=_cell, text=_text)
    package = Path(__file__).parent
    for folder in (package, package.parent):  # in the wheel it lies inside the package, in a source tree beside it
        if (folder / TEMPLATE_FILE).is_file():
            return environment.from_string((folder / TEMPLATE_FILE).read_text(encoding="utf-8"))
    raise FileNotFoundError(f"{TEMPLATE_FILE} is missing from this installation of mats_hub; install it again")


def _values(report: MergeReport, figures: list[str], repo_id: str | None) -> dict[str, Any]:
    recipe, names = report.recipe, [expert["name"] for expert in report.experts]
    _, differ = _licenses(report)
    initialization = dict(recipe["initialization"])
    start = initialization.copy()
    start.pop("method")
    options = ", ".join(f"{name} {value}" for name, value in start.items())
    return {
        "front_matter": yaml.safe_dump(front_matter(report, repo_id), sort_keys=False, allow_unicode=True).rstrip(),
        "title": repo_id.rsplit("/", 1)[-1]
        if repo_id
        else f"{_listed(names)}, merged with {METHODS[recipe['method']].title}",
        "names": names,
        "method": METHODS[recipe["method"]],
        "base": report.base,
        "base_link": _link(report.base) if report.base else "one base",
        "experts": [{**expert, "link": _link(expert)} for expert in report.experts],
        "licenses_differ": differ,
        "usage": _usage(report, repo_id),
        "recipe": recipe,
        "recipe_text": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120).rstrip(),
        "recipe_file": RECIPE_FILE,
        "report_file": REPORT_FILE,
        "curvature": recipe["curvature"],
        "initialization": initialization,
        "initialization_options": f" ({options})" if options else "",
        "solver_text": _solver_text(recipe["solver"]),
        "counts_text": _counts_text(report),
        "ranks": _rank_rows(report),
        "notes": report.notes,
        "statistics": _statistics_rows(report),
        "environment": report.environment,
        "files": report.files,
        "figures": figures,
        "bundle": _bundle_values(report),
        **_convergence_values(report),
        **_result_values(report),
    }


def _licenses(report: MergeReport) -> tuple[str | None, bool]:
    """Return the licence of the front matter and whether the parents' licences differ."""
    parents = [*report.experts, *([report.base] if report.base else [])]
    found = [parent["license"] for parent in parents]
    if not any(found):
        return None, False
    if len(set(found)) == 1:
        return found[0], False
    return "other", True


def _library(report: MergeReport) -> str | None:
    """Return what the model is used with: the experts' library where they are no models of transformers, or of sentences."""
    stated = {expert.get("library") for expert in report.experts}
    own = stated.pop() if len(stated) == 1 else None
    return own if own == SENTENCES or not report.experts[0]["class"] else "transformers"


def _pipeline_tag(report: MergeReport) -> str | None:
    stated = {expert["pipeline_tag"] for expert in report.experts}
    if len(stated) == 1 and None not in stated:
        return str(stated.pop())
    tags = {tag for e in report.experts for suffix, tag in PIPELINE_TAGS.items() if str(e["class"]).endswith(suffix)}
    return tags.pop() if len(tags) == 1 else None


def _model_index(report: MergeReport, repo_id: str | None) -> list[dict[str, Any]]:
    tag, results = _pipeline_tag(report), []
    for row in report.results:
        if row["model"] == MERGED:
            dataset = {"name": row.get("dataset", row["task"]), "type": row.get("dataset", row["task"])}
            metric = {"type": row["metric"], "value": row["value"]}
            results.append({"task": {"type": tag or "other"}, "dataset": dataset, "metrics": [metric]})
    name = repo_id.rsplit("/", 1)[-1] if repo_id else f"{_listed([e['name'] for e in report.experts])} merged"
    return [{"name": name, "results": results}] if results else []


def _usage(report: MergeReport, repo_id: str | None) -> str:
    first, place = report.experts[0], repo_id or "path/to/this/folder"
    if report.bundle or any(expert["kept"] for expert in report.experts):
        tasks = ", ".join(repr(expert["name"]) for expert in report.experts)
        return f"import mats_hub\n\nmodel = mats_hub.load({place!r}, task={first['name']!r})  # one of: {tasks}"
    name = first["class"]
    if not name:
        file = next(iter(report.files))
        path = f"hf_hub_download({repo_id!r}, {file!r})" if repo_id else repr(f"{place}/{file}")
        fetched = "from huggingface_hub import hf_hub_download\n" if repo_id else ""
        return f"{fetched}from safetensors.torch import load_file\n\nweights = load_file({path})"
    if report.recipe["output"]["format"] == "adapter":
        base = (report.base and report.base["repo_id"]) or "path/to/the/base"
        return (
            f"from peft import PeftModel\nfrom transformers import {name}\n\n"
            f"base = {name}.from_pretrained({base!r})\nmodel = PeftModel.from_pretrained(base, {place!r})"
        )
    return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({place!r})"


def _solver_text(solver: dict[str, Any] | None) -> str:
    if solver is None:
        return ""
    if solver["method"] == "exact":
        return "closed form"
    text = f"conjugate gradient, {solver['iterations']} iterations"
    text += f", tolerance {solver['tolerance']:g}" if solver["tolerance"] else ""
    text += f", damping {solver['damping']:g}" if solver.get("damping") else ""
    text += ", Kronecker preconditioner" if solver["preconditioner"] == "kronecker" else ""
    return text + (", within the span of the experts' B factors" if solver.get("subspace") == "factors" else "")


def _counts_text(report: MergeReport) -> str:
    words = {
        "solve": "matched by solving",
        "initialize": "merged by the initialization alone",
        "copy": "taken from the base unchanged",
        "keep per task": "kept per task",
        "tied": "tied to another tensor",
    }
    counts = Counter(record.action for record in report.tensors)
    parts = [f"{counts[action]} {text}" for action, text in words.items() if counts[action]]
    text = f"Of {len(report.tensors)} tensors: {'; '.join(parts)}"
    if report.recipe["output"]["format"] == "adapter":
        cuts = _cut_records(report)
        if not cuts:
            return f"{text}. Written as an (IA)³ adapter"
        worst = max(cuts, key=lambda record: record.truncation or 0)
        text += f". Written as a LoRA adapter of rank {max(record.rank or 0 for record in cuts)}"
        if worst.truncation:
            text += f", which cuts off at most {worst.truncation:.2g} of a task vector's norm (`{worst.key}`)"
        else:
            text += ", exactly"
    return text


def _cut_records(report: MergeReport) -> list[TensorRecord]:
    """Return the records of tensors that are written as factors."""
    return [record for record in report.tensors if record.rank is not None]


def _rank_rows(report: MergeReport) -> list[dict[str, Any]]:
    """Return a row for each factored tensor, when something is lost by it: by a cut, or outside the factors' span."""
    cuts = _cut_records(report)
    if not any(record.truncation or record.outside for record in cuts):
        return []

    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:.2g}"

    return [
        {
            "key": record.key,
            "rank": record.rank,
            "truncation": text(record.truncation),
            "weighted": text(record.weighted_truncation),
            "outside": text(record.outside),
        }
        for record in cuts
    ]


def _statistics_rows(report: MergeReport) -> list[dict[str, Any]]:
    rows = []
    for expert in report.experts:
        s = expert["statistics"]
        if s:
            commit = f" at {s['dataset_commit'][:12]}" if s["dataset_commit"] else ""
            config = f" ({s['dataset_config']})" if s["dataset_config"] else ""
            rows.append(
                {
                    "expert": expert["name"],
                    "kinds": s["kinds"],
                    "data": f"{s['dataset']}{config}{commit}",
                    "split": s["dataset_split"] or "whole file",
                    "examples": s["examples"],
                    "tokens": s["tokens"],
                    "labels": {
                        "data": "of the data (empirical Fisher)",
                        "model": "drawn from the model (true Fisher)",
                        "none": "none needed",
                    }.get(s["label_source"], s["label_source"]),
                }
            )
    return rows


def _convergence_values(report: MergeReport) -> dict[str, Any]:
    solved = report.solved
    if not solved:
        return {"worst": [], "solved_count": 0, "median_start": "", "median_end": ""}
    worst = sorted(solved, key=lambda record: -(record.residual or 0))[:5]
    return {
        "solved_count": len(solved),
        "median_start": f"{median(record.residuals[0] for record in solved):.2g}",
        "median_end": f"{median(record.residual or 0 for record in solved):.2g}",
        "worst": [
            {
                "key": record.key,
                "outcome": record.outcome,
                "iterations": record.iterations,
                "start": f"{record.residuals[0]:.2g}",
                "end": f"{record.residual or 0:.2g}",
                "step": f"{(record.step_norm or 0) / (record.initialization_norm or 1):.2g}",
            }
            for record in worst
        ],
    }


def _result_values(report: MergeReport) -> dict[str, Any]:
    models = list(dict.fromkeys(row["model"] for row in report.results))
    tasks = list(dict.fromkeys((row["task"], row["metric"]) for row in report.results))
    scores = {(row["task"], row["metric"], row["model"]): row["value"] for row in report.results}
    rows = []
    for task, metric in tasks:
        values = [scores.get((task, metric, model)) for model in models]
        rows.append({"task": task, "metric": metric, "values": ["–" if v is None else f"{v:.3f}" for v in values]})
    return {"results": rows, "result_models": models}


def _bundle_values(report: MergeReport) -> dict[str, Any] | None:
    if not report.bundle:
        return None

    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    facts = report.bundle
    rows = [
        {
            "task": name,
            "scale": f"{task['mask_scale']:g}",
            "size": human_bytes(task["bytes"]),
            "kept": share(task["kept"]),
        }
        for name, task in facts["tasks"].items()
    ]
    sizes = {name: human_bytes(facts[name]) for name in ("bytes", "expert_bytes", "full_bytes")}
    return {"rows": rows, **sizes}


def _link(facts: dict[str, Any]) -> str:
    if facts["repo_id"]:
        name, _, commit = facts["model"].partition("@")
        folder = name.removeprefix(facts["repo_id"])
        return f"[{name}](https://huggingface.co/{facts['repo_id']}{f'/tree/{commit}{folder}' if folder else ''})"
    return f"{_text(facts['model'])} (a local folder)"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _text(value: object) -> str:
    """Return a value as Markdown text in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]$])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def _cell(value: object) -> str:
    return _text(value).replace("|", "\\|")

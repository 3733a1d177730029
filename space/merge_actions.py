"""What the page does: every button's function."""

from __future__ import annotations

import base64
import html
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import pandas as pd
from example_experts import EXAMPLE, HUB_ID, REPOSITORY, Example, check_ids
from lineage_graph import lineage_svg
from merge_jobs import Job, Jobs, what_does_not_fit
from presets import TITLES
from run_views import answers, body_of, curves_of, pictures, problem_list, scores, worst

import mats_hub
from mats_hub import MatsError, Recipe
from mats_hub.browsing import read_card, read_recipe
from mats_hub.hub_id import from_address
from mats_hub.jobs import hardware

ON_A_SPACE = bool(os.environ.get("SPACE_ID"))

MAX_RUNS = 20
"""Merges of his that a visitor's browser remembers."""

EXAMPLE_EXPERTS = Example()
JOBS = Jobs(example=EXAMPLE_EXPERTS)


def token_of(token: gr.OAuthToken | None) -> str | bool | None:
    """Return the visitor's token; on a Space never the server's own."""
    return token.token if token is not None else (False if ON_A_SPACE else None)


# --- 1. experts


def add(chosen: str | None, experts: list[str]) -> tuple[list[str], Any]:
    """Add an expert."""
    chosen = from_address((chosen or "").strip())
    if not HUB_ID.fullmatch(chosen) or ".." in chosen:
        raise gr.Error(f"{chosen[:80]!r} is no Hub id. Write owner/name or owner/name@revision.")
    if chosen in experts:
        raise gr.Error(f"{chosen} is there already.")
    experts = [*(name for name in experts if not name.startswith(EXAMPLE)), chosen]
    return experts, gr.update(choices=experts, value=[])


def remove(marked: list[str], experts: list[str]) -> tuple[list[str], Any]:
    """Take experts away."""
    experts = [name for name in experts if name not in marked]
    return experts, gr.update(choices=experts, value=[])


def use_example(progress: gr.Progress = gr.Progress()) -> tuple[list[str], Any, str, str]:  # noqa: B008
    """Take the example's experts, which are trained when nobody asked for them before."""

    def shown(items: Any, total: int, description: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number % 20 == 0:
                progress((number, total), desc=description)
            yield item

    EXAMPLE_EXPERTS.prepare(shown)
    names = EXAMPLE_EXPERTS.ids
    return names, gr.update(choices=names, value=[]), f"{EXAMPLE}base", TITLES[0]


def cards(experts: list[str], base: str, token: gr.OAuthToken | None) -> str:
    """Return the experts as a table, with every problem where it is; read from configs and headers alone."""
    if not experts:
        return "<p>No expert yet: search the Hub, or take the example.</p>"
    try:
        recipe = check_ids(Recipe.build(experts, base=base.strip() or None, method="average"), EXAMPLE_EXPERTS)
        plan = mats_hub.make_plan(recipe, token_of(token))
    except (MatsError, ValueError) as error:
        return problem_list([str(error)])
    names = list(experts)
    rows = []
    for expert in plan.experts:
        size = sum(expert.source.sizes[name] for name in expert.source.weight_files)
        licence = expert.source.front_matter.get("license") or "not stated"
        found = "yes" if any(name.startswith("statistics") for name in expert.source.sizes) else "not beside it"
        shown = next((name for name in names if name.partition("@")[0].rsplit("/", 1)[-1] == expert.name), expert.name)
        rows.append((shown, expert.kind, f"{size / 1e6:.1f} MB", licence, found))
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("expert", "kind", "weights", "licence", "statistics"))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    base_line = f"<p>Base: <b>{html.escape(plan.base.source.name if plan.base else 'none; name it above')}</b></p>"
    table = f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{base_line}"
    fine = "" if plan.problems else "<p>✓ They fit together.</p>"
    return table + fine + problem_list([str(problem) for problem in plan.problems])


# --- 2. how: the recipe (its form is in recipe_form)


def link_to(text: str) -> str:
    """Return what to add to the page's address so that it opens with this recipe."""
    return "?recipe=" + base64.urlsafe_b64encode(text.encode()).decode() if text else ""


def opened_run(job: str, request: gr.Request) -> tuple[str, Any]:
    """Take the merge that the page's address names, or the one that was shown last, while there is such."""
    name = request.query_params.get("run", "") or job
    return name, gr.Timer(active=JOBS.get(name) is not None)


def opened(request: gr.Request) -> tuple[Any, Any, Any, Any]:
    """Read the recipe of a shared link; without one, leave alone what a visitor may have begun already."""
    packed = request.query_params.get("recipe", "")
    nothing = gr.skip(), gr.skip(), gr.skip(), gr.skip()
    if not packed or len(packed) > 20_000:
        return nothing
    try:
        return from_yaml(base64.urlsafe_b64decode(packed.encode()).decode())
    except ValueError:
        return nothing


def from_yaml(text: str) -> tuple[str, list[str], Any, str]:
    """Take the experts and the base of a recipe into the form."""
    try:
        recipe = Recipe.from_yaml(text or "")
    except MatsError as error:
        raise gr.Error(str(error)) from None
    experts = [entry.model for entry in recipe.experts]
    return recipe.to_yaml(), experts, gr.update(choices=experts, value=[]), recipe.base or ""


# --- 3. plan


def plan_of(text: str, token: gr.OAuthToken | None) -> tuple[str, str, Any, str]:
    """Return what a merge would do, what stands in the way, whether it can be begun, and the recipe that all of this is of."""
    try:
        plan = mats_hub.make_plan(check_ids(Recipe.from_yaml(text or ""), EXAMPLE_EXPERTS), token_of(token))
    except (MatsError, ValueError) as error:
        return "", problem_list([str(error)]), gr.update(interactive=False), text
    problems, lacking = [str(problem) for problem in plan.problems], []
    if not problems:
        lacking = what_does_not_fit(plan)
    said = problem_list(problems)
    if lacking:
        said += problem_list(lacking) + elsewhere(token)
    return str(plan), said, gr.update(interactive=not (problems or lacking)), text


def elsewhere(token: gr.OAuthToken | None) -> str:
    """Say how a merge that is too large for this machine is done on a larger one, and what a Job costs."""
    try:
        flavors = hardware(token_of(token))
    except MatsError:
        flavors = {}
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(text)}</td></tr>"
        for name, text in flavors.items()
    )
    table = (
        "<p>As a Job of Hugging Face, paid by whose token it is: "
        "<code>mats-hub merge recipe.yaml --job FLAVOR --push OWNER/NAME</code></p>"
        "<div class='scroll'><table><thead><tr><th scope='col'>flavor</th><th scope='col'>what it is and costs</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div>"
    )
    return (
        "<p>It is too large for this machine. Copy the recipe into <code>recipe.yaml</code>, and merge it on a larger one: "
        f"<code>mats-hub merge recipe.yaml --output merged</code></p>{table if rows else ''}"
    )


# --- 4. merge


def start(text: str, runs: list[str], token: gr.OAuthToken | None) -> tuple[str, list[str], Any, Any]:
    """Begin a merge in the background."""
    try:
        recipe = check_ids(Recipe.from_yaml(text or ""), EXAMPLE_EXPERTS)
        is_example = all(entry.model.startswith(EXAMPLE) for entry in Recipe.from_yaml(text).experts)
        job = JOBS.start(recipe, token_of(token), is_example=is_example)
    except (MatsError, ValueError, RuntimeError) as error:
        raise gr.Error(str(error)) from None
    return job, [*runs[-MAX_RUNS:], job], gr.Walkthrough(selected=3), gr.Timer(active=True)


def my_runs(runs: list[str]) -> pd.DataFrame:
    """Return this visitor's merges that are still here, newest first."""
    found = [job for job in map(JOBS.get, reversed(runs)) if job is not None]
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job.began)),
            job.recipe.method,
            ", ".join(entry.name or entry.model for entry in job.recipe.experts),
            job.state,
            f"?run={job.name}",
        )
        for job in found
    ]
    return pd.DataFrame(rows, columns=["begun", "method", "experts", "state", "link"])


def open_run(table: pd.DataFrame, event: gr.SelectData) -> tuple[str, Any, Any, Any]:
    """Show the chosen merge."""
    name = str(table.iloc[event.index[0]]["link"]).removeprefix("?run=")
    return name, gr.Timer(active=True), gr.Tabs(selected="merge"), gr.Walkthrough(selected=3)


def status(job: Job | None) -> str:
    """Return where a merge is."""
    if job is None:
        return "<p>No merge is running.</p>"
    if job.state == "waiting":
        return f"<p role='status'>Waiting: {JOBS.ahead(job)} before this one.</p>"
    if job.state == "running":
        now = job.progress_file.read()
        share = f"<progress max='{now['total'] or 1}' value='{now['done']}' aria-label='progress'></progress>"
        solved = f" · {len(now['curves'])} tensors solved" if now["curves"] else ""
        step = html.escape(now["step"] or "beginning")
        return f"<p role='status'>{step}: {now['done']} of {now['total']}{solved}</p>{share}"
    if job.state == "done":
        return "<p role='status'>✓ Merged.</p>"
    if job.state == "cancelled":
        return "<p role='status'>Stopped. Nothing of it was kept.</p>"
    return problem_list([job.error])


def poll(name: str | None) -> tuple[Any, ...]:
    """Return what is to be shown of a merge now."""
    job = JOBS.get(name)
    running = job is not None and not job.over
    curves = job.progress_file.read()["curves"] if job is not None else {}
    merged = job.merged if job is not None else None
    buttons = gr.update(interactive=running), gr.update(interactive=merged is not None)
    now = (status(job), curves_of(curves) if curves else gr.skip(), gr.Timer(active=running), *buttons)
    if job is None or merged is None:
        return *now, *(gr.skip() for _ in range(5))
    card = (merged.folder / "README.md").read_text(encoding="utf-8")
    return *now, gr.Walkthrough(selected=4), pictures(job, merged), scores(merged), worst(merged), card


def try_it(name: str | None, text: str, image: Any) -> list[list[str]]:
    """Return what the merged model says to an input, for each task."""
    job = JOBS.get(name)
    if job is None or job.merged is None:
        raise gr.Error("Merge something first.")
    if image is None and not text.strip():
        raise gr.Error("Write a text, or choose an image.")
    try:
        return answers(job, image if image is not None else text)
    except (MatsError, ValueError, OSError, KeyError, AttributeError) as error:
        raise gr.Error(f"The merged model cannot answer that: {error}") from None


def example_image(number: float) -> Any:
    """Return an image of the example's test data, enlarged."""
    if not EXAMPLE_EXPERTS.data:
        raise gr.Error("Take the example first.")
    data = EXAMPLE_EXPERTS.data["upright-digit"]["test"]
    return data[int(number) % len(data)]["image"]


# --- 5. publish


def publish(
    name: str | None,
    repo_id: str,
    private: bool,
    as_pull_request: bool,
    card: str,
    profile: gr.OAuthProfile | None,
    token: gr.OAuthToken | None,
) -> str:
    """Publish the merged model with its card, in one commit."""
    job = JOBS.get(name)
    merged = job.merged if job is not None else None
    if merged is None:
        raise gr.Error("There is nothing to publish: merge something first. Merges are kept for an hour.")
    if profile is None and (ON_A_SPACE or token is None):
        raise gr.Error("Sign in with Hugging Face first.")
    if not re.fullmatch(REPOSITORY, repo_id.strip()):
        raise gr.Error(f"{repo_id[:80]!r} is no name for a repository; write owner/name.")
    (merged.folder / "README.md").write_text(card, encoding="utf-8")
    try:
        url = merged.push_to_hub(repo_id.strip(), token=token_of(token), private=private, create_pr=as_pull_request)
    except MatsError as error:
        raise gr.Error(str(error)) from None
    return f"Published: [{html.escape(repo_id.strip())}]({url})"


def who(profile: gr.OAuthProfile | None) -> tuple[str, Any]:
    """Say who is signed in, and suggest a name."""
    if profile is None:
        return "Not signed in.", gr.skip()
    return f"Signed in as **{html.escape(profile.username)}**.", f"{profile.username}/merged-model"


# --- browse


def find_merges(words: str, author: str, token: gr.OAuthToken | None) -> pd.DataFrame:
    """Return merges on the Hub that carry a recipe."""
    try:
        found = mats_hub.browse(words.strip() or None, author=author.strip() or None, token=token_of(token))
    except MatsError as error:
        raise gr.Error(str(error)) from None
    rows = [
        (m.repo_id, m.method, ", ".join(m.experts), m.base or "", "" if m.mean is None else round(m.mean, 3), m.likes)
        for m in found
    ]
    return pd.DataFrame(rows, columns=["model", "method", "experts", "base", "mean result", "likes"])


def read(table: pd.DataFrame, event: gr.SelectData, token: gr.OAuthToken | None) -> tuple[str, str, str, str]:
    """Return the chosen merge's id, card and lineage."""
    name = str(table.iloc[event.index[0]]["model"])
    try:
        text = read_card(name, token_of(token))
        tree = mats_hub.lineage(name, token_of(token))
    except MatsError as error:
        raise gr.Error(str(error)) from None
    return name, body_of(text), str(tree), lineage_svg(tree)


def remix(name: str, token: gr.OAuthToken | None) -> tuple[str, list[str], Any, str, Any]:
    """Take a published merge's recipe into the form."""
    if not HUB_ID.fullmatch(name or ""):
        raise gr.Error("Choose a merge in the table first.")
    try:
        recipe = read_recipe(name, token_of(token))
    except MatsError as error:
        raise gr.Error(str(error)) from None
    return *from_yaml(recipe.to_yaml()), gr.Tabs(selected="merge")

"""The page: choose experts, choose how, see the plan, watch the merge, understand it, publish it; and browse merges."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import gradio as gr
import merge_actions as do
import named_actions
import recipe_form
from model_search import search_box
from presets import TITLES

THEME = gr.themes.Soft(primary_hue="indigo")
QUEUED: dict[str, Any] = {"api_visibility": "private"}
"""Of what takes long or much memory; not for programs."""

HIDDEN: dict[str, Any] = {**QUEUED, "queue": False}
"""Of everything else that is not for programs, answered at once: of what is queued in the moment in which the stream of earlier
outcomes closes, Gradio's client never hears the outcome."""

CSS = """
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
.prose table { display: block; overflow-x: auto } .prose :is(th, td) { overflow-wrap: normal; word-break: normal }
.katex-display { overflow-x: auto; overflow-y: hidden }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--border-color-primary) }
.problems { border-left: 4px solid #c92a2a; padding: .4rem .8rem; margin: .5rem 0 } progress { width: 100%; height: 1rem }
#figures img { background: white }
#figures .grid-wrap { max-height: none; height: auto; overflow: visible }
#figures .thumbnail-item { aspect-ratio: 3 / 2 }
#figures .thumbnail-item img { padding: 2.2rem .2rem }
#figures .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
#tried img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }
"""

PROGRAMS = """
What the page does can be asked by programs, too. `plan` says what a merge would do and every problem of it, `inspect` what a
model is, `status` where a merge is, `browse` lists merges that carry a recipe; none of them writes anything.

**Python:** `gradio_client.Client("THIS-PAGE'S-ADDRESS").predict(recipe, api_name="/plan")`. A Hub token for private models goes
as the header `Authorization: Bearer hf_…`.

**MCP**, for assistants: the same as tools, at `THIS-PAGE'S-ADDRESS/gradio_api/mcp/` (streamable HTTP).

**To merge**: `pip install mats-hub`, then `mats-hub merge recipe.yaml --output merged` with the recipe that this page shows.
"""


def build() -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(title="MaTS Merge", delete_cache=(3600, 7200)) as page:
        gr.HTML(f"<style>{CSS}</style>")
        gr.Markdown(
            "# MaTS Merge\nSeveral models fine-tuned from one base become one that does all their tasks: no training, no data."
        )
        experts = gr.State([])
        job = gr.BrowserState(
            "", storage_key="mats-merge-job", secret=os.environ.get("MATS_STATE_SECRET", "mats-merge")
        )
        runs = gr.BrowserState(
            [], storage_key="mats-merge-runs", secret=os.environ.get("MATS_STATE_SECRET", "mats-merge")
        )
        timer = gr.Timer(1.0, active=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Merge", id="merge"):
                yaml_text, marked, base, walk = merge_tab(experts, job, runs, timer)
            with gr.Tab("My runs", id="runs") as mine:
                gr.Markdown(
                    "Merges that this browser began, for as long as they are kept. The link opens one anywhere."
                )
                held = gr.Dataframe(label="My runs", interactive=False, wrap=True)
            with gr.Tab("Browse", id="browse"):
                browse_tab(yaml_text, experts, marked, base, tabs)
            with gr.Tab("API", id="api"):
                gr.Markdown(PROGRAMS)
        mine.select(do.my_runs, runs, held, **HIDDEN)
        held.select(do.open_run, held, [job, timer, tabs, walk], **HIDDEN)
        # A merge that still runs, or is done, is found again after a reload.
        page.load(do.opened_run, job, [job, timer], api_visibility="private")
        page.load(do.opened, None, [yaml_text, experts, marked, base], api_visibility="private")
        gr.api(named_actions.plan_recipe, api_name="plan")
        gr.api(named_actions.inspect_model, api_name="inspect")
        gr.api(named_actions.merge_status, api_name="status")
        gr.api(named_actions.browse_merges, api_name="browse")
    for action in page.fns.values():
        if action.api_name == "_check_login_status":  # the sign-in button's own, which nobody else has a use for
            action.api_visibility = "private"
    return page


def experts_step() -> SimpleNamespace:
    """Build the first step: which models."""
    gr.Markdown("Search the Hub for models that were fine-tuned from the same base, or paste their ids.")
    found = search_box()
    problems = gr.HTML()
    example = gr.Button("Try the example", variant="secondary")
    base = gr.Textbox(
        label="Base",
        info="adapters name theirs; full checkpoints need it",
        placeholder="owner/name",
        max_length=200,
    )
    table = gr.HTML(do.cards([], "", None), label="Experts")
    marked = gr.CheckboxGroup([], label="Chosen experts (mark to remove)")
    with gr.Row():
        drop = gr.Button("Remove marked")
        to_method = gr.Button("Next: choose how", variant="primary")
    return SimpleNamespace(
        example=example,
        found=found,
        problems=problems,
        base=base,
        table=table,
        marked=marked,
        drop=drop,
        to_method=to_method,
    )


def how_step() -> SimpleNamespace:
    """Build the second step: the recipe."""
    preset = gr.Radio(TITLES, value=TITLES[0], label="Method")
    about = gr.Markdown(
        recipe_form.explained(TITLES[0]),
        latex_delimiters=[{"left": "$$", "right": "$$", "display": True}],
        min_height=130,  # what is below stays where it is when another method is explained
    )
    names, inputs = [], []
    with gr.Accordion("Advanced: every option", open=False):
        for part, fields in recipe_form.schema_fields().items():
            gr.Markdown(f"**{part}**")
            with gr.Row():
                for name, field in fields.items():
                    names.append(name)
                    inputs.append(recipe_form.component(name, field))
    write = gr.Button("Write the recipe", variant="primary")
    problems = gr.HTML()
    yaml_text = gr.Code(language="yaml", label="Recipe (editable; Escape and Tab leave it)", lines=8, max_lines=18)
    with gr.Row():
        apply = gr.Button("Take experts from the recipe")
        to_plan = gr.Button("Next: see the plan", variant="primary")
    with gr.Accordion("Share this recipe", open=False):
        link = gr.Textbox(label="Add this to the page's address", interactive=False, max_lines=2, buttons=["copy"])
    return SimpleNamespace(
        preset=preset,
        about=about,
        names=names,
        inputs=inputs,
        write=write,
        problems=problems,
        yaml_text=yaml_text,
        apply=apply,
        to_plan=to_plan,
        link=link,
    )


def plan_step() -> SimpleNamespace:
    """Build the third step: what will happen."""
    problems = gr.HTML()
    plan_text = gr.Code(label="What will happen", interactive=False)
    recipe = gr.State("")  # that the plan is of: what is merged is what was planned, whatever was written since
    go = gr.Button("Merge", variant="primary", interactive=False)
    return SimpleNamespace(problems=problems, plan_text=plan_text, recipe=recipe, go=go)


def merging_step() -> SimpleNamespace:
    """Build the fourth step: the merge as it runs."""
    shown = gr.HTML(do.status(None))
    plot = gr.LinePlot(
        x="iteration", y="log10 of the relative residual", color="tensor", title="Residuals of the last solved tensors",
        height=280,
    )  # fmt: skip
    with gr.Row():
        stop = gr.Button("Stop", variant="stop", interactive=False)
        to_result = gr.Button("Next: the result", interactive=False)
    gr.Markdown("You may close this page: the merge goes on, and is found again when you come back.")
    return SimpleNamespace(shown=shown, plot=plot, stop=stop, to_result=to_result)


def result_step() -> SimpleNamespace:
    """Build the fifth step: what came out."""
    gallery = gr.Gallery(label="Figures", columns=2, object_fit="contain", height=None, elem_id="figures")
    results = gr.Dataframe(label="Results", interactive=False)
    layers = gr.Dataframe(
        label="The least converged weights",
        interactive=False,
        wrap=True,
        column_widths=["400px", "80px", "150px", "310px"],
    )
    gr.Markdown("### Try it")
    with gr.Row():
        text = gr.Textbox(label="A text", max_length=2000)
        image = gr.Image(label="or an image", type="pil", height=200, sources=["upload", "clipboard"], elem_id="tried")
        with gr.Column():
            number = gr.Slider(0, 400, step=1, label="or a test image of the example")
            pick = gr.Button("Take it")
            problems = gr.HTML()
    ask = gr.Button("Ask the merged model", variant="primary")
    said = gr.Dataframe(
        headers=["task", "merged model", "confidence", "its expert", "confidence"],
        label="Answers",
        interactive=False,
    )
    to_publish = gr.Button("Next: publish")
    return SimpleNamespace(
        gallery=gallery,
        results=results,
        layers=layers,
        text=text,
        image=image,
        number=number,
        pick=pick,
        problems=problems,
        ask=ask,
        said=said,
        to_publish=to_publish,
    )


def publish_step() -> SimpleNamespace:
    """Build the last step: publishing."""
    if os.environ.get("OAUTH_CLIENT_ID") or signed_in_here():
        login = gr.LoginButton()
        del login
    me = gr.Markdown("Not signed in.")
    repo = gr.Textbox(label="Repository", placeholder="owner/name", max_length=200)
    with gr.Row():
        private = gr.Checkbox(True, label="private")
        pull = gr.Checkbox(False, label="as a pull request")
    push = gr.Button("Publish", variant="primary")
    done = gr.Markdown()
    with gr.Tabs():
        with gr.Tab("Card, rendered"):
            rendered = gr.Markdown(sanitize_html=True, height=500)
        with gr.Tab("Card, to edit"):
            card = gr.Code(language="markdown", label="README.md", lines=16, max_lines=30)
    return SimpleNamespace(
        me=me, repo=repo, private=private, pull=pull, rendered=rendered, card=card, push=push, done=done
    )


def merge_tab(experts: Any, job: Any, runs: Any, timer: Any) -> tuple[Any, Any, Any, Any]:
    """Build the steps of a merge, and say what their buttons do."""
    with gr.Walkthrough(selected=0) as walk:
        with gr.Step("Experts", id=0):
            first = experts_step()
        with gr.Step("How", id=1):
            how = how_step()
        with gr.Step("Plan", id=2):
            plan = plan_step()
        with gr.Step("Merge", id=3):
            run = merging_step()
        with gr.Step("Result", id=4):
            result = result_step()
        with gr.Step("Publish", id=5):
            last = publish_step()
    connect_choice(walk, experts, first, how, plan)
    connect_run(walk, job, runs, timer, plan, run, result, last)
    return how.yaml_text, first.marked, first.base, walk


def go_to(walk: Any, step: int) -> dict[str, Any]:
    """Return what a button does that leads to a step."""
    return {"fn": lambda: gr.Walkthrough(selected=step), "inputs": None, "outputs": walk, **HIDDEN}


def leading(walk: Any, step: int, event: dict[str, Any]) -> dict[str, Any]:
    """Return what a button does that leads to a step as soon as what is shown there is known.

    As an event of its own, what is shown would come after the visitor may have changed it already.
    """

    @wraps(event["fn"])
    def led(*arguments: Any) -> tuple[Any, ...]:
        return gr.Walkthrough(selected=step), *event["fn"](*arguments)

    return event | {"fn": led, "outputs": [walk, *event["outputs"]]}


def tried(fn: Callable[..., Any], inputs: Any, outputs: list[Any], problems: Any) -> dict[str, Any]:
    """Return what an event does that may not be possible: it says so in `problems`, and changes nothing else then.

    Gradio's own message of an error is for queued events alone.
    """

    @wraps(fn)
    def told(*arguments: Any) -> tuple[Any, ...]:
        try:
            found = fn(*arguments)
        except gr.Error as error:
            return *(gr.skip() for _ in outputs), do.problem_list([error.message])
        return *(found if len(outputs) > 1 else (found,)), ""

    return {"fn": told, "inputs": inputs, "outputs": [*outputs, problems], **HIDDEN}


def connect_choice(
    walk: Any, experts: Any, first: SimpleNamespace, how: SimpleNamespace, plan: SimpleNamespace
) -> None:
    """Say what the buttons of the first steps do, from the choice of experts to the plan."""
    form = [experts, first.base, how.preset, *how.inputs]
    chosen, taken = [experts, first.marked], [how.yaml_text, experts, first.marked, first.base]
    # What is chosen while an earlier choice is still being looked at is looked at, too.
    latest: dict[str, Any] = {"trigger_mode": "always_last"}
    changed = {"fn": do.cards, "inputs": [experts, first.base], "outputs": first.table, **HIDDEN, **latest}

    def writing(what: Callable[..., str], *before: Any) -> dict[str, Any]:
        def written(*values: Any) -> str:
            given = len(before) + 3
            return what(*values[:given], how.names, list(values[given:]))

        return tried(written, [*before, *form], [how.yaml_text], how.problems) | latest

    write = writing(recipe_form.recipe_of)
    keep = writing(recipe_form.kept_or_written, how.yaml_text)
    there = writing(recipe_form.there_or_written, how.yaml_text)
    first.found.submit(**tried(do.add, [first.found, experts], chosen, first.problems)).then(**changed)
    first.drop.click(do.remove, [first.marked, experts], chosen, **HIDDEN).then(**changed)
    first.base.blur(**changed)
    example = first.example.click(do.use_example, None, [*chosen, first.base, how.preset], **QUEUED)
    example.then(**changed).then(**write)
    first.to_method.click(**leading(walk, 1, keep))
    how.preset.change(recipe_form.explained, how.preset, how.about, **HIDDEN)
    how.preset.input(**write)
    how.write.click(**write)
    how.yaml_text.change(do.link_to, how.yaml_text, how.link, **HIDDEN)
    how.apply.click(**tried(do.from_yaml, how.yaml_text, taken, how.problems)).then(**changed)
    planned = [plan.plan_text, plan.problems, plan.go, plan.recipe]
    how.to_plan.click(**leading(walk, 2, there)).then(do.plan_of, how.yaml_text, planned, **HIDDEN)


def connect_run(
    walk: Any,
    job: Any,
    runs: Any,
    timer: Any,
    plan: SimpleNamespace,
    run: SimpleNamespace,
    result: SimpleNamespace,
    last: SimpleNamespace,
) -> None:
    """Say what the buttons do from the start of a merge on, and what is shown while it runs."""
    plan.go.click(**tried(do.start, [plan.recipe, runs], [job, runs, walk, timer], plan.problems))
    seen = [run.shown, run.plot, timer, run.stop, run.to_result, walk]
    seen += [result.gallery, result.results, result.layers, last.card]
    timer.tick(do.poll, job, seen, show_progress="hidden", **HIDDEN)
    run.stop.click(do.JOBS.cancel, job, None, **HIDDEN)
    run.to_result.click(**go_to(walk, 4))
    result.pick.click(**tried(do.example_image, result.number, [result.image], result.problems))
    result.ask.click(do.try_it, [job, result.text, result.image], result.said, **QUEUED)
    result.to_publish.click(**go_to(walk, 5)).then(do.who, None, [last.me, last.repo], **HIDDEN)
    last.card.change(do.body_of, last.card, last.rendered, **HIDDEN)
    last.push.click(do.publish, [job, last.repo, last.private, last.pull, last.card], last.done, **QUEUED)


def browse_tab(yaml_text: Any, experts: Any, marked: Any, base: Any, tabs: Any) -> None:
    """Build the search among published merges."""
    with gr.Row():
        words = gr.Textbox(label="Words in the id", max_length=100)
        author = gr.Textbox(label="Author", max_length=100)
        find = gr.Button("Find merges", variant="primary")
    problems = gr.HTML()
    table = gr.Dataframe(label="Merges that carry a recipe", interactive=False, wrap=True)
    name = gr.Textbox(label="Chosen", interactive=False)
    take = gr.Button("Remix: load its recipe")
    graph = gr.HTML(label="Lineage")
    with gr.Accordion("Lineage as text", open=False):
        tree = gr.Code(label="Lineage", interactive=False)
    card = gr.Markdown(sanitize_html=True)
    find.click(**tried(do.find_merges, [words, author], [table], problems))
    table.select(**tried(do.read, table, [name, card, tree, graph], problems))
    take.click(**tried(do.remix, name, [yaml_text, experts, marked, base, tabs], problems))


def signed_in_here() -> bool:
    """Tell whether this machine has a token, which stands in for signing in when the page runs on it."""
    from huggingface_hub import get_token

    return not do.ON_A_SPACE and get_token() is not None

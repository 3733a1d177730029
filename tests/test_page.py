"""The page, in a real browser on loopback with the suite's Hub server behind it; its jobs and its named API without one."""

from __future__ import annotations

import base64
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import family as families
import hub_jobs  # noqa: F401 (the Hub server answers about Jobs then)
import huggingface_hub
import models
import pytest
import yaml
from playwright.sync_api import sync_playwright

import mats_hub
from mats_hub import demo
from mats_hub.browsing import Lineage
from mats_hub.recipe import Recipe

gradio = pytest.importorskip("gradio", reason="the page's tests need Gradio: pip install 'mats-hub[ui]'")
SPACE = Path(mats_hub.__file__).parents[1] / "space"
sys.path.insert(0, str(SPACE))
TOKEN = "mock-oauth-token-for-local-dev"  # what Gradio hands out to whoever signs in outside of a Space
ALICE = {"name": "alice", "fullname": "Alice", "avatarUrl": "", "type": "user", "id": "1", "orgs": []}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser_test = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def page_module(tmp_path_factory):
    """Import the page with signing in as on a Space, and the example trained in a moment."""
    import gradio.oauth

    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    patch.setenv("MATS_JOBS", str(tmp_path_factory.mktemp("jobs")))
    patch.setattr(gradio.oauth, "get_token", lambda: TOKEN)
    patch.setattr(gradio.oauth, "whoami", lambda *arguments, **options: ALICE)
    patch.setattr(demo, "BASE_STEPS", 30)
    patch.setattr(demo, "EXPERT_STEPS", 5)
    import merge_page

    patch.setattr(merge_page, "signed_in_here", lambda: True)
    yield merge_page
    patch.undo()


@pytest.fixture(scope="module")
def served(page_module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = page_module.build()
        _, url, _ = built.launch(
            theme=page_module.THEME, prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, ssr_mode=False,
            show_error=True, mcp_server=True,
        )  # fmt: skip
    yield url
    built.close()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, served):
    """Open the page as a visitor of one's own; whatever it asks of other machines, and errors in it, fail the test."""
    contexts, wrong = [], []

    def open_page(width: int = 1200, query: str = "", script: str = "", **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.add_init_script(script)
        page.on(
            "request",
            lambda r: wrong.append(r.url) if not re.match(r"(http://127\.0\.0\.1|data:|blob:)", r.url) else None,
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(served + query)
        page.get_by_role("button", name="Try the example").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return families.make_family(tmp_path_factory.mktemp("family"), card=families.EXPERT_CARD)


@pytest.fixture
def published(hub, local):
    """Put the family on the Hub as alice's, whose token is the one that the page hands out."""
    families.publish(hub, local, TOKEN)
    return hub


def click(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def add(page, spec: str) -> None:
    page.get_by_label("Search models").fill(spec)
    page.get_by_label("Search models").press("Enter")
    page.get_by_role("checkbox", name=spec).wait_for()


def choose_average(page) -> None:
    page.get_by_role("radio", name="Average").click()
    page.get_by_text("curvature: null").wait_for()  # no other recipe of these tests has that; MaTS' names average, too


# --- in the browser


@browser_test
def test_from_the_example_to_a_published_merge_and_its_remix(visit, published):
    page = visit()
    click(page, "Try the example")
    page.get_by_text("They fit together").wait_for(timeout=60_000)  # the example trains its experts first
    click(page, "Next: choose how")
    page.get_by_text("example/sideways-parity").last.wait_for()
    click(page, "Next: see the plan")
    page.get_by_text("nothing stands in the way").wait_for()
    click(page, "Merge")
    page.get_by_text("The least converged weights").wait_for()
    page.get_by_role("img", name=re.compile("Score of each model")).or_(
        page.get_by_text("Score of each model")
    ).first.wait_for()
    page.get_by_text("upside-down-size").last.wait_for()
    click(page, "Take it")
    page.locator("#tried img").wait_for()
    click(page, "Ask the merged model")
    page.get_by_text(re.compile(r"^\d+%$")).locator("visible=true").first.wait_for()
    click(page, "Next: publish")
    page.get_by_text("Not signed in.").wait_for()
    page.get_by_role("button", name="Sign in with Hugging Face").click()
    page.get_by_role("button", name="Try the example").wait_for()
    # Signing in leaves the page; the merge is found again.
    page.get_by_text("The least converged weights").wait_for()
    click(page, "Next: publish")
    page.get_by_text("Signed in as alice").wait_for()
    page.get_by_label("Repository").fill("alice/digits")
    page.get_by_role("tab", name="Card, to edit").click()
    editor = page.locator(".cm-content").last
    editor.click()
    page.keyboard.press("Control+End")
    page.keyboard.type("\nWritten on the page.")
    click(page, "Publish")
    page.get_by_text("Published: alice/digits").wait_for()
    files = published.files("alice/digits")
    assert "Written on the page." in files["README.md"].decode()
    assert "model.safetensors" in files
    assert Recipe.from_yaml(files["mats_recipe.yaml"].decode()).method == "mats"
    assert published.find("alice/digits").private


@browser_test
def test_models_are_found_as_one_types_by_keyboard_and_mouse(visit, published):
    page = visit()
    box = page.get_by_role("combobox", name="Search models")
    box.press_sequentially("alph")
    page.get_by_role("option", name="alice/alpha").wait_for()
    box.press("ArrowDown")
    assert box.get_attribute("aria-activedescendant") == "finder-0"
    box.press("Enter")
    page.get_by_role("checkbox", name="alice/alpha").wait_for()
    box.press_sequentially("bet")
    page.get_by_role("option", name="alice/beta").click()
    page.get_by_role("checkbox", name="alice/beta").wait_for()
    box.fill(f"{huggingface_hub.constants.ENDPOINT}/alice/gamma/tree/main")
    page.get_by_role("option", name="alice/gamma").wait_for()
    box.press("Enter")
    page.get_by_role("checkbox", name="alice/gamma", exact=True).wait_for()
    box.press_sequentially("no such model")
    page.get_by_text("The Hub has no model that matches").wait_for()
    box.press("Escape")
    assert box.get_attribute("aria-expanded") == "false"


@browser_test
def test_the_way_to_a_merge_by_keyboard_alone(visit, published):
    page = visit()

    def press(name: str) -> None:
        button = page.get_by_role("button", name=name, exact=True)
        for _ in range(80):
            page.keyboard.press("Escape")  # out of the recipe's editor, in which Tab indents
            page.keyboard.press("Tab")
            if button.evaluate("element => element === document.activeElement"):
                return page.keyboard.press("Enter")
        raise AssertionError(f"{name!r} is not reached by the Tab key")

    press("Try the example")
    page.get_by_text("They fit together").wait_for()
    press("Next: choose how")
    page.get_by_text("example/sideways-parity").last.wait_for()
    press("Next: see the plan")
    page.get_by_text("nothing stands in the way").wait_for()
    press("Merge")
    page.get_by_text("The least converged weights").wait_for()


@browser_test
def test_a_run_has_a_link_of_its_own(visit, page_module, published):
    recipe = Recipe.build(["alice/alpha", "alice/beta"], base="alice/base", method="average")
    name = page_module.do.JOBS.start(recipe, TOKEN)
    page = visit(query=f"?run={name}")
    page.get_by_text("Where the experts agree").or_(
        page.get_by_role("img", name=re.compile("Where the experts agree"))
    ).first.wait_for()
    other = visit(query="?run=guess")
    other.get_by_role("tab", name="My runs").click()
    assert not other.get_by_text("alpha, beta").locator("visible=true").count()


@browser_test
def test_experts_of_the_hub_are_merged_browsed_and_remixed(visit, published):
    merged = mats_hub.merge(
        [f"alice/{name}" for name in families.LABELS], base="alice/base", method="ties", density=0.37, token=TOKEN
    )
    merged.push_to_hub("alice/first", token=TOKEN)
    page = visit()
    page.get_by_role("tab", name="Browse").click()
    click(page, "Find merges")
    page.get_by_text("alice/first").locator("visible=true").first.click()
    page.get_by_role("img", name=re.compile("Lineage of alice.first")).locator("visible=true").wait_for()
    assert page.locator("svg text").filter(has_text="alice/alpha").count() == 1
    click(page, "Remix: load its recipe")
    page.get_by_role("checkbox", name=re.compile("alpha@")).wait_for()
    click(page, "Next: choose how")
    page.locator(".cm-content").filter(has_text="density: 0.37").locator("visible=true").first.wait_for()


@browser_test
def test_a_merge_survives_a_reload_and_stops_when_told_to(visit, page_module, published):
    page = visit()
    for name in ("alpha", "beta"):
        add(page, f"alice/{name}")
    recipe = Recipe.build(["alice/alpha", "alice/beta"], base="alice/base", method="average")

    def slowly(job) -> None:
        for _ in job.progress(range(10_000), 10_000, "taking its time"):
            time.sleep(0.01)

    page.get_by_label("Base").fill("alice/base")
    click(page, "Next: choose how")
    choose_average(page)
    # The explanation is of another height, and moves the button below it: no click while it may come.
    page.get_by_text(page_module.recipe_form.explained("Average").partition("\n")[0]).wait_for()
    before = len(page_module.do.JOBS._jobs)
    slow = page_module.do.JOBS.start(page_module.do.check_ids(recipe, page_module.do.EXAMPLE_EXPERTS), TOKEN, slowly)
    click(page, "Next: see the plan")
    click(page, "Merge")  # waits for the plan, without which it is disabled
    page.get_by_text("Waiting: 1 before this one").wait_for()
    assert len(page_module.do.JOBS._jobs) == before + 2
    page.reload()
    page.get_by_role("button", name="Try the example").wait_for()
    other = visit()
    assert not other.get_by_text("Waiting").locator("visible=true").count(), "what one visitor merges is not another's"
    page_module.do.JOBS.cancel(slow)
    page.get_by_text("The least converged weights").wait_for()  # its own merge is done, and found again
    job = page_module.do.JOBS.get(slow)
    deadline = time.monotonic() + 60
    while not job.over and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.state == "cancelled"
    assert job.merged is None


CLOSES_LATE = """
const fetched = window.fetch;
window.fetch = async (request, options) => {
  const answer = await fetched(request, options);
  if (!(request.url ?? String(request)).includes("/queue/data")) return answer;
  const late = new TransformStream({
    async transform(bytes, out) {
      const text = new TextDecoder().decode(bytes), end = text.indexOf('data: {"msg":"close_stream"');
      const parts = end < 0 ? [text] : [text.slice(0, end), text.slice(end)];
      for (const [number, part] of parts.entries()) {
        if (number) await new Promise(done => setTimeout(done, 1500));
        out.enqueue(new TextEncoder().encode(part));
      }
    }
  });
  return new Response(answer.body.pipeThrough(late), {status: answer.status, headers: answer.headers});
};
"""
"""As on a busy machine: the message that closes the stream of queued events comes late. Gradio's client then never hears what
becomes of an event that was queued before that message came and answered after."""


@browser_test
def test_no_click_is_lost_while_a_stream_of_events_closes(visit, published):
    page = visit(script=CLOSES_LATE)
    for name in ("alpha", "beta"):
        add(page, f"alice/{name}")
    page.get_by_label("Base").fill("alice/base")
    click(page, "Next: choose how")
    choose_average(page)
    click(page, "Next: see the plan")
    click(page, "Merge")
    page.get_by_text("The least converged weights").wait_for()


@browser_test
def test_what_cannot_be_done_is_said_where_it_was_asked_for(visit):
    page = visit()
    click(page, "Next: choose how")
    page.get_by_role("alert").filter(has_text="Add experts first.").locator("visible=true").wait_for()
    page.get_by_role("tab", name="Browse").click()
    click(page, "Remix: load its recipe")
    page.get_by_role("alert").filter(has_text="Choose a merge in the table first.").locator("visible=true").wait_for()


HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "https://example.com/x.safetensors",
    "a/../b",
    "<img src=x onerror=alert(1)>/x",
]


@browser_test
def test_hostile_and_unfit_experts_are_refused_where_they_are_written(visit, published, tmp_path):
    models.tiny_gpt2(tmp_path / "gpt2")
    published.create("alice/gpt2", {p.name: p.read_bytes() for p in (tmp_path / "gpt2").iterdir()})
    published.create("bob/gated", {p.name: p.read_bytes() for p in (tmp_path / "gpt2").iterdir()}, gated=True)
    page = visit()
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    for text in HOSTILE:
        page.get_by_label("Search models").fill(text)
        page.get_by_label("Search models").press("Enter")
        page.get_by_role("alert").filter(has_text=f"'{text}' is no Hub id").wait_for()
    add(page, "alice/alpha")
    page.get_by_role("alert").wait_for(state="detached")
    add(page, "bob/gated")
    page.get_by_role("alert").filter(has_text="bob/gated").filter(has_text="huggingface").or_(
        page.get_by_role("alert").filter(has_text="gated")
    ).locator("visible=true").first.wait_for()
    page.get_by_role("checkbox", name="bob/gated").check()
    click(page, "Remove marked")
    page.get_by_role("checkbox", name="bob/gated").wait_for(state="detached")
    add(page, "alice/gpt2")
    page.get_by_label("Base").fill("alice/base")
    page.get_by_label("Base").blur()
    page.get_by_role("alert").filter(has_text="gpt2").locator("visible=true").first.wait_for()
    click(page, "Next: choose how")
    bad = (
        Recipe.build(["alice/alpha"], base="alice/base", method="average")
        .to_yaml()
        .replace("alice/alpha", "/etc/passwd")
    )
    page.goto(page.url.split("?")[0] + "?recipe=" + base64.urlsafe_b64encode(bad.encode()).decode())
    page.get_by_role("checkbox", name="/etc/passwd").wait_for()
    click(page, "Next: choose how")
    click(page, "Next: see the plan")
    page.get_by_role("alert").filter(has_text="'/etc/passwd' is no Hub id").last.wait_for()
    assert page.get_by_role("button", name="Merge", exact=True).is_disabled()
    assert not dialogs


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(visit, published, scheme):
    page = visit(390, "?__theme=" + scheme)
    add(page, "alice/alpha")
    for step in ("Next: choose how", "Next: see the plan"):
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390
        click(page, step)
    page.get_by_text("method: mats").first.wait_for(state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


# --- without a browser


def test_the_named_api_plans_and_browses(served, published):
    from gradio_client import Client

    merged = mats_hub.merge(["alice/alpha", "alice/beta"], base="alice/base", method="average", token=TOKEN)
    merged.push_to_hub("alice/first", token=TOKEN)
    client = Client(served, verbose=False)
    named = set(client.view_api(return_format="dict")["named_endpoints"])
    assert named == {"/plan", "/browse", "/inspect", "/status"}
    recipe = Recipe.build(["alice/alpha", "alice/beta"], base="alice/base", method="ties").to_yaml()
    assert "nothing stands in the way of this merge" in client.predict(recipe, api_name="/plan")
    [found] = client.predict("first", "alice", api_name="/browse")
    assert found["id"] == "alice/first"
    assert found["experts"] == ["alice/alpha", "alice/beta"]
    said = client.predict("alice/alpha", "alice/base", api_name="/inspect")
    assert (said["kind"], said["license"], said["statistics"]) == ("full checkpoint", "apache-2.0", False)
    with pytest.raises(Exception, match="no such merge"):
        client.predict("guess", api_name="/status")
    for name in ("../x", "/etc/passwd", "https://example.com/x"):
        with pytest.raises(Exception, match="is no Hub id"):
            client.predict(recipe.replace("alice/alpha", name), api_name="/plan")
        with pytest.raises(Exception, match="is no Hub id"):
            client.predict(name, "", api_name="/inspect")
    with pytest.raises(Exception, match=r"not valid YAML|holds no mapping"):
        client.predict("!!python/object/apply:os.system [ls]", api_name="/plan")


def test_assistants_find_the_same_actions_as_tools(served, published):
    import asyncio

    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def ask() -> tuple[dict[str, str], list[str]]:
        async with (
            streamablehttp_client(served + "gradio_api/mcp/") as (reading, writing, _),
            ClientSession(reading, writing) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool.description for tool in (await session.list_tools()).tools}
            calls = [
                ("inspect_model", {"model": "alice/alpha", "base": "alice/base"}),
                ("inspect_model", {"model": "../../etc/passwd"}),
            ]
            answers = [await session.call_tool(*call) for call in calls]
            return tools, [answer.content[0].text for answer in answers]

    with ThreadPoolExecutor() as apart:  # the browser's own loop runs in this thread
        tools, (known, hostile) = apart.submit(lambda: asyncio.run(ask())).result()
    assert {"plan_recipe", "browse_merges", "inspect_model", "merge_status"} == set(tools)
    assert "every problem" in tools["plan_recipe"]
    assert "full checkpoint" in known
    assert "is no Hub id" in hostile


def test_names_in_a_lineage_are_text(page_module):
    from lineage_graph import lineage_svg

    hostile = "<script>alert(1)</script>'\" onload='x"
    root = Lineage(hostile, "", "ties", [Lineage(hostile, "expert", note=hostile)])
    drawn = lineage_svg(root)
    elements = list(ElementTree.fromstring(drawn).iter())
    assert {element.tag for element in elements} == {"div", "svg", "g", "title", "rect", "text", "path"}
    assert not any("onload" in element.attrib for element in elements)


def test_paths_urls_and_local_folders_are_no_ids(page_module, tmp_path, monkeypatch):
    example = SimpleNamespace(ids=[], path=lambda name: name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    good = Recipe.build(["a/b@refs/pr/1", {"model": "c/d", "statistics": "e/f"}], base="g/h", method="mats")
    checked = page_module.do.check_ids(good, example)
    assert [entry.name for entry in checked.experts] == ["b", "d"]
    for bad in (*HOSTILE, "owner/name", "a", "", "a/b//c", "a/b/.c"):
        for change in ({"model": bad}, {"model": "a/b", "statistics": bad}):
            with pytest.raises(ValueError, match="is no Hub id"):
                page_module.do.check_ids(Recipe.build([change], base="g/h", method="mats"), example)
        with pytest.raises(ValueError, match="is no Hub id"):
            page_module.do.check_ids(Recipe.build(["a/b"], base=bad, method="average"), example)


def test_jobs_wait_for_each_other_and_are_forgotten(page_module, local, monkeypatch, tmp_path):
    import merge_jobs

    jobs, hold = merge_jobs.Jobs(tmp_path / "jobs"), threading.Event()
    recipe = Recipe.build(local.experts, base=local.base, method="average")
    first = jobs.start(recipe, None, lambda job: hold.wait(30))
    second = jobs.start(recipe, None)
    failing = jobs.start(Recipe.build(["/nowhere"], base=local.base, method="average"), None)
    assert jobs.ahead(jobs.get(second)) == 1
    assert jobs.get(second).state == "waiting"
    assert jobs.get("guess") is None
    stopped = jobs.start(recipe, None)
    jobs.cancel(stopped)
    for _ in range(merge_jobs.MAX_WAITING - 3):
        jobs.start(recipe, None)
    with pytest.raises(RuntimeError, match="Too many merges are waiting"):
        jobs.start(recipe, None)
    hold.set()
    jobs._worker.shutdown(wait=True)
    assert [jobs.get(name).state for name in (first, second, failing, stopped)] == [
        "done",
        "done",
        "failed",
        "cancelled",
    ]
    assert "/nowhere" in jobs.get(failing).error
    folder = jobs.get(first).merged.folder
    assert folder.is_dir()
    assert not jobs.get(stopped).output.exists()
    assert [path.name for path in jobs.get(first).folder.glob("*.png")] == [merge_jobs.AGREEMENT]
    assert {path.name for path in jobs.get(stopped).folder.iterdir()} == {"job.json", "progress.json", "stop"}
    monkeypatch.setattr(merge_jobs, "KEEP_SECONDS", -1.0)
    jobs._clean()
    assert jobs.get(first) is None
    assert not folder.exists()


def test_jobs_of_an_earlier_page_are_found_and_go_on(page_module, local, tmp_path):
    import merge_jobs

    recipe = Recipe.build(local.experts, base=local.base, method="average")
    first = merge_jobs.Jobs(tmp_path)
    done = first.start(recipe, None)
    first._worker.shutdown(wait=True)
    digest = first.get(done).merged.report.files
    for name, token in (("goes-on", None), ("of-somebody", "hf_secret")):
        (tmp_path / name).mkdir()
        merge_jobs.Job(name, tmp_path / name, recipe, token, state="running").save()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "job.json").write_text("{}")
    assert "hf_secret" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    second = merge_jobs.Jobs(tmp_path)
    second._worker.shutdown(wait=True)
    assert second.get(done).merged.report.files == digest
    assert second.get("goes-on").merged.report.files == digest
    assert second.get("of-somebody").state == "failed"
    assert "restarted" in second.get("of-somebody").error
    assert second.get("junk") is None


def test_what_all_merges_take_of_the_disk_has_a_limit(page_module, local, monkeypatch, tmp_path):
    import merge_jobs

    jobs = merge_jobs.Jobs(tmp_path)
    recipe = Recipe.build(local.experts, base=local.base, method="average")
    names = [jobs.start(recipe, None) for _ in range(3)]
    jobs._worker.shutdown(wait=True)
    size = sum(path.stat().st_size for path in jobs.get(names[0]).folder.rglob("*") if path.is_file())
    monkeypatch.setattr(merge_jobs.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(merge_jobs, "DISK_SHARE", 0.7)
    jobs._clean()
    assert [jobs.get(name) is not None for name in names] == [False, True, True]
    assert size > 0


def test_the_time_on_a_lent_gpu_grows_with_what_is_to_be_done(page_module, monkeypatch):
    import merge_jobs

    def seconds(size: float, tensors: int) -> int:
        plan = SimpleNamespace(bytes_to_fetch=size, disk_bytes=size, merged_entries=range(tensors))
        monkeypatch.setattr(merge_jobs.mats_hub, "make_plan", lambda *arguments: plan)
        return merge_jobs.gpu_seconds(Recipe.build(["a/b"], method="average").to_yaml(), "", None)

    assert seconds(0, 0) == 20
    assert seconds(0, 0) < seconds(1e9, 200) < seconds(2e9, 400) < seconds(1e12, 400) == merge_jobs.MOST_GPU_SECONDS


def test_what_is_too_large_is_said_with_what_a_job_costs(page_module, local, published, monkeypatch):
    import merge_jobs

    plan = mats_hub.make_plan(Recipe.build(local.experts, base=local.base, method="average"))
    assert merge_jobs.what_does_not_fit(plan) == []
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    [said] = merge_jobs.what_does_not_fit(plan)
    assert "of memory, but 800 B are free" in said
    recipe = Recipe.build(["alice/alpha"], base="alice/base", method="average").to_yaml()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    _, said, button, _ = page_module.do.plan_of(recipe, None)
    assert "800 B are free" in said
    assert "--job FLAVOR" in said
    assert "per minute" in said
    assert not button["interactive"]


def test_the_front_matter_asks_for_the_least():
    text = (SPACE / "README.md").read_text()
    matter = yaml.safe_load(text.split("---")[1])
    assert (matter["sdk"], matter["app_file"]) == ("gradio", "app.py")
    assert (SPACE / matter["app_file"]).is_file()
    assert set(matter["hf_oauth_scopes"]) == {"read-repos", "gated-repos", "contribute-repos"}
    assert matter["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    assert len(matter["short_description"]) <= 60


def test_a_page_that_opens_late_takes_nothing_away(page_module):
    for query in ({}, {"recipe": "%%%"}, {"recipe": "x" * 30_000}):
        given = page_module.do.opened(SimpleNamespace(query_params=query))
        assert list(given) == [gradio.skip()] * 4


def test_every_option_of_the_schema_is_on_the_page(page_module):
    from mats_hub.recipe import OPTION_OWNERS

    shown = {name for fields in page_module.recipe_form.schema_fields().values() for name in fields}
    assert shown == {"weight", *OPTION_OWNERS}
    for preset in page_module.recipe_form.PRESETS:
        Recipe.build(["a/b"], base="c/d", **preset.options)


def test_experts_have_weights(page_module):
    def written(weights: str) -> Recipe:
        form = ["a/b", "c/d"], "e/f", page_module.do.TITLES[0], ["weight"], [weights]
        return Recipe.from_yaml(page_module.recipe_form.recipe_of(*form))

    assert [entry.weight for entry in written("").experts] == [1, 1]
    assert [entry.weight for entry in written("1.5 -0.5").experts] == [1.5, -0.5]
    with pytest.raises(gradio.Error, match="3 weights for 2 experts"):
        written("1 2 3")
    with pytest.raises(gradio.Error, match=r"experts\.1\.weight: .*'two'"):
        written("1 two")


@pytest.mark.slow
def test_the_page_is_served_by_the_command_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "mats_hub", "ui", "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert "MaTS Merge" in answer.read().decode()
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                assert server.poll() is None
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(20)

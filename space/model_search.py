"""The search box: models of the Hub as one types, by keyboard or mouse; whatever is typed or found is text, never markup."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from typing import Any

import gradio as gr
from example_experts import HUB_ID

from mats_hub import MatsError
from mats_hub.hub_client import hub_api, hub_errors
from mats_hub.hub_id import from_address

FOUND, KEPT_SECONDS, KEPT = 8, 60.0, 500
PER_MINUTE = 240
"""Questions that the Hub is asked in a minute at most, whoever asks them."""

TEMPLATE = """
<div class="finder">
  <label for="finder-input">Search models</label>
  <input id="finder-input" role="combobox" aria-expanded="false" aria-controls="finder-list" aria-autocomplete="list"
    autocomplete="off" spellcheck="false" maxlength="200" placeholder="words, owner/name, or the address of its page">
  <ul id="finder-list" role="listbox" aria-label="Found models" hidden></ul>
  <p class="finder-note" role="status"></p>
</div>
"""

CSS = """
.finder { position: relative }
.finder label { display: block; margin-bottom: .3rem; font-size: .9rem }
.finder input { width: 100%; padding: .6rem .8rem; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--input-background-fill); color: var(--body-text-color) }
.finder ul { list-style: none; margin: .2rem 0 0; padding: 0; border: 1px solid var(--border-color-primary);
  border-radius: 8px; background: var(--background-fill-primary); max-height: 18rem; overflow-y: auto }
.finder li { padding: .5rem .8rem; cursor: pointer; display: flex; justify-content: space-between; gap: 0 1rem; flex-wrap: wrap;
  overflow-wrap: anywhere }
.finder li small { opacity: .75; white-space: nowrap }
.finder li[aria-selected=true], .finder li:hover { background: var(--color-accent-soft) }
.finder-note { margin: .3rem 0 0; min-height: 1.2em; font-size: .85rem }
"""

SCRIPT = """
const input = element.querySelector('input'), list = element.querySelector('ul'), note = element.querySelector('p');
let asked = 0, waiting = null, chosen = -1;
const show = open => { list.hidden = !open; input.setAttribute('aria-expanded', open); };
const take = id => { show(false); input.value = ''; note.textContent = ''; props.value = id; trigger('submit'); };
const mark = position => {
  chosen = position;
  [...list.children].forEach((item, number) => {
    item.setAttribute('aria-selected', number === position);
    if (number === position) { input.setAttribute('aria-activedescendant', item.id); item.scrollIntoView({block: 'nearest'}); }
  });
};
const look = async () => {
  const words = input.value.trim(), mine = ++asked;
  if (words.length < 2) { show(false); note.textContent = ''; return; }
  let answer;
  try { answer = JSON.parse(await server.find(words)); }
  catch (error) { answer = {note: 'The search did not answer.', found: []}; }
  if (mine !== asked) return;
  list.replaceChildren(...answer.found.map((model, number) => {
    const item = document.createElement('li'), about = document.createElement('small');
    item.id = 'finder-' + number; item.setAttribute('role', 'option'); item.textContent = model.id;
    about.textContent = model.about; item.append(about);
    item.addEventListener('mousedown', event => { event.preventDefault(); take(model.id); });
    return item;
  }));
  note.textContent = answer.note;
  show(answer.found.length > 0); mark(-1);
};
input.addEventListener('input', () => { clearTimeout(waiting); waiting = setTimeout(look, 150); });
input.addEventListener('blur', () => show(false));
input.addEventListener('keydown', event => {
  const count = list.hidden ? 0 : list.children.length;
  if (event.key === 'ArrowDown' && count) { event.preventDefault(); mark((chosen + 1) % count); }
  else if (event.key === 'ArrowUp' && count) { event.preventDefault(); mark((chosen + count - 1) % count); }
  else if (event.key === 'Escape') show(false);
  else if (event.key === 'Enter') {
    event.preventDefault(); clearTimeout(waiting); asked++;
    if (chosen >= 0 && count) take(list.children[chosen].firstChild.textContent);
    else if (input.value.trim()) take(input.value.trim());
  }
});
"""


class Finder:
    """Asks the Hub for models; the same words are asked once in a while, and all together not too often."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._asked: list[float] = []

    def find(self, words: str) -> str:
        """Return what the Hub finds for some words: ``found``, ids with what each is, and a note, as JSON."""
        words = from_address(words.strip()) if isinstance(words, str) else ""
        if not 2 <= len(words) <= 100:
            return json.dumps({"found": [], "note": ""})
        now = time.monotonic()
        held = self._kept.get(words)
        if held and now < held[0] + KEPT_SECONDS:
            return held[1]
        self._asked = [moment for moment in self._asked if moment > now - 60]
        if len(self._asked) >= PER_MINUTE:
            return json.dumps({"found": [], "note": "Too many searches at the moment; an id can be entered as it is."})
        self._asked.append(now)
        answer = json.dumps(self._ask(words))
        self._kept[words] = (now, answer)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return answer

    @staticmethod
    def _ask(words: str) -> dict[str, Any]:
        name = words.partition("@")[0]
        own = [{"id": words, "about": "this id"}] if HUB_ID.fullmatch(words) else []
        try:
            with hub_errors("the Hub's models"):
                # Anybody may call this: what it finds is what anybody may see.
                listed = list(
                    hub_api(False).list_models(
                        search=name, limit=FOUND, expand=["gated", "library_name", "downloads", "pipeline_tag"]
                    )
                )
        except MatsError as error:
            return {"found": own, "note": str(error)}
        found = [{"id": info.id, "about": _about(info)} for info in listed if info.id != words]
        note = "" if own or found else f"The Hub has no model that matches “{words}”."
        return {"found": [*own, *found], "note": note or f"{len(own) + len(found)} found"}


def _about(info: Any) -> str:
    parts = [info.library_name, info.pipeline_tag, "gated" if info.gated else "", f"{info.downloads or 0} downloads"]
    return " · ".join(str(part) for part in parts if part)


def search_box() -> gr.HTML:
    """Return the box; its value is the id that was chosen last, and `submit` is what happens then."""
    finder = Finder()

    def find(words: str) -> str:
        return finder.find(words)

    return gr.HTML(
        "", html_template=TEMPLATE, css_template=CSS, js_on_load=SCRIPT, server_functions=[find],
        container=False, padding=False,
    )  # fmt: skip

"""The page, built with Gradio, and its HTTP API.

Every search of the page is a step of a dialogue (`dialogue.Trail`), which Gradio keeps for a
visitor. What is asked goes through one `Batcher`, not through Gradio's batches: there a request
that lacks an argument spoils the answers of all that share its batch.
"""

import asyncio
import dataclasses
import json
import pathlib
import time

import gradio as gr

from crn_jax.catalogue import pictures
from crn_jax.catalogue.batcher import Batcher
from crn_jax.catalogue.encoders import MAX_TEXT
from crn_jax.catalogue.page import conditions, markup
from crn_jax.catalogue.page.dialogue import Reference, Step, Trail
from crn_jax.catalogue.page.thumbnails import Uploads
from crn_jax.catalogue.retriever import Query, Retriever
from crn_jax.errors import UserError
from crn_jax.reports.pictures import palette

# Pictures that the page shows; that the API gives at most.
SHOWN, MOST = 40, 100

# Of these the page offers those that the model has words for.
_EXAMPLES = ("is red", "is blue with long sleeves", "is black", "has no pattern", "is shorter",
             "is green and has stripes")  # fmt: skip

_HERE = pathlib.Path(__file__).parent
CSS = (_HERE / "page.css").read_text(encoding="utf-8")
_SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")
HEAD = f"<script>{_SCRIPT}</script>"
# Tells Python which button of a part of the page was pressed, by its data attributes.
_PRESSED = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { ...button.dataset });
});
"""
# The step that is shown is in sight, where they do not all fit.
_IN_SIGHT = """
watch("value", () => {
  const current = element.querySelector("[aria-current]");
  if (current) current.closest("ol").scrollLeft = current.offsetLeft - 48;
});
"""


def theme() -> gr.themes.Base:
  """Fonts of the visitor's system: nothing is fetched from elsewhere."""
  return gr.themes.Default(
    primary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
  ).set(
    button_primary_background_fill=palette.BLUE,
    button_primary_background_fill_dark=palette.BLUE,
    button_primary_background_fill_hover=palette.BLUE,
    button_primary_background_fill_hover_dark=palette.BLUE,
    button_primary_text_color="white",
    body_text_color_subdued=palette.LIGHT["faint"],
    body_text_color_subdued_dark=palette.DARK["faint"],
  )


@dataclasses.dataclass(frozen=True)
class _Facet:
  """The controls of a field of the metadata, which give what `conditions.expression` takes.

  Attributes:
    name: of the field.
    controls: one for values, two for the bounds of a number.
    values: label -> value of the control for values; None for numbers.
  """

  name: str
  controls: list
  values: dict | None

  def read(self, given: list):
    """The filter that the controls' values say; None if they say nothing."""
    if self.values is not None:
      return [self.values[label] for label in given[0] or () if label in self.values] or None
    bounds = zip(("least", "greatest"), given, strict=True)
    return {name: value for name, value in bounds if value is not None} or None

  def show(self, where) -> list:
    """The controls' values for a filter."""
    if self.values is not None:
      return [[label for label, value in self.values.items() if value in (where or ())]]
    return [(where or {}).get("least"), (where or {}).get("greatest")]


class Page:
  """The page of one catalogue.

  Attributes:
    blocks: of Gradio.
  """

  def __init__(self, retriever: Retriever, batcher: Batcher, uploads: Uploads, name: str):
    self._retriever, self._batcher, self._uploads = retriever, batcher, uploads
    self._n = len(retriever)
    with gr.Blocks(title=f"{name}: search", analytics_enabled=False, delete_cache=(600, 600)) as b:
      self._lay_out(name)
      self._connect(b)
      self._offer_api()
    self.blocks = b.queue(default_concurrency_limit=64, max_size=256)

  def _lay_out(self, name: str) -> None:
    bare = {"apply_default_css": False}
    gr.HTML(markup.heading(name, self._n), elem_id="heading", **bare)
    with gr.Row(elem_id="page"):
      with gr.Column(scale=0, min_width=320, elem_id="panel"):
        self._card = gr.HTML("", elem_id="card", js_on_load=_PRESSED, **bare)
        self._upload = gr.File(
          label="Reference picture", type="binary", height=110, elem_id="upload",
          file_types=list(pictures.SUFFIXES),
        )  # fmt: skip
        self._text = gr.Textbox(
          label="What is different, or what you look for", elem_id="text",
          placeholder="e.g. is blue with long sleeves", max_length=MAX_TEXT, max_lines=4,
        )  # fmt: skip
        self._search = gr.Button("Search", variant="primary", elem_id="search")
        known = [text for text in _EXAMPLES if not self._retriever.unknown_words(text)]
        self._examples = gr.HTML(
          markup.examples(known), elem_id="examples", js_on_load=_PRESSED, **bare
        )
        with gr.Accordion("Filters", open=False, elem_id="filters"):
          self._facets = _facets(self._retriever.about.facets)
          self._floor = gr.Number(
            label="Least score", placeholder="-1 to 1", value=None, step=0.05, elem_id="floor"
          )
      with gr.Column(scale=1, min_width=280, elem_id="found"):
        self._trail_shown = gr.HTML("", elem_id="trail", js_on_load=_PRESSED + _IN_SIGHT, **bare)
        self._status = gr.HTML("", elem_id="status", **bare)
        self._look = gr.Button("Where the model looks", size="sm", visible=False, elem_id="look")
        self._attention = gr.HTML("", elem_id="attention", **bare)
        self._results = gr.HTML("", elem_id="results", js_on_load=_PRESSED, **bare)
    self._reference, self._trail = gr.State(None), gr.State(Trail())

  def _connect(self, blocks: gr.Blocks) -> None:
    controls = [self._text, self._floor, *(c for f in self._facets for c in f.controls)]
    outputs = [self._trail, self._reference, self._card, self._upload, *controls, self._trail_shown,
               self._status, self._look, self._attention, self._results]  # fmt: skip
    state = [self._trail, self._reference, *controls]
    hidden = {"outputs": outputs, "show_progress": "hidden", "api_visibility": "private"}
    focus = {"fn": None, "js": "() => window.backToText()", "api_visibility": "private"}
    look = {"fn": None, "js": "() => window.onToResults()", "api_visibility": "private"}

    blocks.load(self._begin, [self._trail], **hidden)
    for event in (self._search.click, self._text.submit):
      event(self._ask, state, **hidden).then(**look)
    for control in (self._floor, *(c for f in self._facets for c in f.controls)):
      # While one answer is waited for, people go on typing.
      control.input(self._ask, state, trigger_mode="always_last", **hidden)
    self._upload.upload(self._take, [self._upload, *state], **hidden).then(**focus)
    self._results.select(self._choose, state, **hidden).then(**focus)
    self._card.select(self._remove, state, **hidden)
    self._examples.select(self._exemplify, state, **hidden).then(**look)
    self._trail_shown.select(self._go_back, [self._trail], **hidden)
    self._look.click(
      self._explain, [self._trail], [self._attention, self._status], show_progress="minimal",
      show_progress_on=self._look, api_visibility="private",
    )  # fmt: skip

  async def _begin(self, trail: Trail):
    # Gradio's page takes an empty number for 0 until it is told that it is none.
    return self._controls(trail.current) | await self._shown(trail)

  async def _ask(self, trail: Trail, reference: Reference | None, *controls):
    return await self._shown(trail.asked(self._step(reference, controls)))

  async def _take(self, content: bytes | None, trail: Trail, reference, *controls):
    if content is None:
      return {}
    try:
      name = await asyncio.to_thread(self._uploads.add, content)
    except UserError as error:
      return {self._upload: None, self._status: markup.failure(str(error))}
    return await self._ask(trail, Reference(name, uploaded=True), *controls)

  async def _choose(self, event: gr.EventData, trail: Trail, reference, text, *controls):
    # The text was about the picture before.
    found = await self._ask(trail, Reference(str(event.id)), "", *controls)
    return {self._text: "", **found}

  async def _remove(self, trail: Trail, reference, *controls):
    return await self._ask(trail, None, *controls)

  async def _exemplify(self, event: gr.EventData, trail: Trail, reference, text, *controls):
    text = str(event.text)
    return {self._text: text, **await self._ask(trail, reference, text, *controls)}

  async def _go_back(self, event: gr.EventData, trail: Trail):
    trail = trail.back_to(int(event.step))
    return self._controls(trail.current) | await self._shown(trail)

  def _controls(self, step: Step) -> dict:
    """What the controls say at a step."""
    controls = {self._text: step.text, self._floor: step.floor}
    for facet in self._facets:
      controls |= zip(facet.controls, facet.show(step.filters.get(facet.name)), strict=True)
    return controls

  def _step(self, reference: Reference | None, controls: tuple) -> Step:
    text, floor, *given = controls
    where = {}
    for facet in self._facets:
      values, given = given[: len(facet.controls)], given[len(facet.controls) :]
      if (asked := facet.read(values)) is not None:
        where[facet.name] = asked
    return Step(reference, (text or "").strip(), json.dumps(where), floor)

  async def _shown(self, trail: Trail) -> dict:
    """The page at a step of a dialogue, or what is wrong with it in a sentence.

    Without the controls: people may have gone on typing meanwhile.
    """
    step = trail.current
    try:
      start = time.monotonic()
      found = await self._found(step)
      status = self._said(step, found, time.monotonic() - start)
    except UserError as error:
      # Of it no step remains.
      return {self._status: markup.failure(str(error)), self._upload: None}
    explained = self._retriever.attends and bool(step.reference and step.text)
    return {
      self._trail: trail,
      self._reference: step.reference,
      self._card: markup.card(step.reference),
      self._upload: None,
      self._trail_shown: markup.trail(trail),
      self._status: status,
      self._look: gr.update(visible=explained),
      self._attention: "",
      self._results: markup.results(found),
    }

  async def _found(self, step: Step):
    filter_ = conditions.expression(self._retriever.about.facets, step.filters)
    if not step.asks:
      return await asyncio.to_thread(self._retriever.sample, SHOWN, filter_)
    future = self._batcher.submit(self._query(step, filter_), SHOWN)
    hits = await asyncio.wrap_future(future)
    return [hit for hit in hits if step.floor is None or hit.score >= step.floor]

  def _query(self, step: Step, filter_: str = "") -> Query:
    image = identifier = None
    if step.reference is not None and step.reference.uploaded:
      image = self._uploads.get(step.reference.name)
    elif step.reference is not None:
      identifier = step.reference.name
    return Query(image, step.text, identifier, filter_)

  def _said(self, step: Step, found, seconds: float) -> str:
    if not found:
      return markup.status("Nothing is found. Are filters or the least score too strict?")
    if not step.asks:
      return markup.status("Choose a picture, upload one of yours, or say what you look for.")
    words = self._retriever.unknown_words(step.text)
    return markup.status(
      f"The best {len(found)} of {self._n:,} pictures, in {1e3 * seconds:,.0f} ms", words
    )

  async def _explain(self, trail: Trail):
    step = trail.current
    try:
      found = await asyncio.to_thread(self._retriever.attention, self._query(step))
    except UserError as error:
      return {self._status: markup.failure(str(error))}
    maps = await asyncio.to_thread(markup.attention_maps, found, step.text) if found else ""
    return {self._attention: maps}

  def _offer_api(self) -> None:
    """The HTTP API: one function, whose arguments have the types of these invisible fields."""
    with gr.Row(visible=False):
      image = gr.File(label="image", type="binary")
      identifier, text = gr.Textbox(label="id"), gr.Textbox("", label="text")
      where, k = gr.JSON(label="where"), gr.Number(10, label="k", precision=0)
      floor, found = gr.Number(label="min_score"), gr.JSON(label="hits")
      gr.Button().click(
        self.search,
        [image, text, identifier, where, k, floor],
        found,
        api_name="search",
        queue=False,
      )

  async def search(self, image=None, text="", id=None, where=None, k=10, min_score=None) -> dict:
    """Finds pictures by a picture, a text, or a picture that is to be changed as a text says.

    Args:
      image: a picture file.
      text: what shall be different about it, or a description.
      id: of a picture of the catalogue, in place of image.
      where: filters: field -> list of values, or {"least": x, "greatest": y}.
      k: how many, 1 to 100.
      min_score: pictures that score less are left out.

    Returns:
      "hits": id, score, width, height and metadata of each picture, best first;
      "unknown_words": words of the text that the model has not learned.
    """
    try:
      if not isinstance(k, int) or not 1 <= k <= MOST:
        raise UserError(f"k: expected 1 to {MOST}, got {k}")
      filter_ = conditions.expression(self._retriever.about.facets, where or {})
      query = Query(image, text or "", id or None, filter_)
      hits = await asyncio.wrap_future(self._batcher.submit(query, k))
    except UserError as error:
      raise gr.Error(str(error), print_exception=False) from error
    kept = [hit for hit in hits if min_score is None or hit.score >= min_score]
    # Where the files lie on the server is nobody's business.
    said = [{k: v for k, v in dataclasses.asdict(hit).items() if k != "path"} for hit in kept]
    return {"hits": said, "unknown_words": self._retriever.unknown_words(text or "")}


def _facets(facets: dict) -> list[_Facet]:
  """Controls for the fields that have values to choose from, or bounds."""
  found = []
  for name, facet in facets.items():
    if "values" in facet:
      labels = {_label(value): value for value in facet["values"]}
      control = gr.Dropdown(list(labels), label=name, multiselect=True, value=[])
      found.append(_Facet(name, [control], labels))
    elif "least" in facet:
      least, greatest = facet["least"], facet["greatest"]
      with gr.Row():
        bounds = [
          gr.Number(label=f"{name} from", placeholder=f"{least:g}", value=None, min_width=100),
          gr.Number(label=f"{name} to", placeholder=f"{greatest:g}", value=None, min_width=100),
        ]
      found.append(_Facet(name, bounds, None))
  return found


def _label(value: str | bool) -> str:
  return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value

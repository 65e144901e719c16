"""The page in a real browser: a dialogue as people have it, and what goes wrong on the way."""

import threading

import pytest

from crn_jax.catalogue.retriever import Retriever
from tests.catalogue import served

pytest.importorskip("gradio")
pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.usefixtures("quick_compile")]

WAIT = 30_000  # Milliseconds, on a busy machine.


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return served.catalogue(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def retriever(place):
  with Retriever.open(place / "a.db", batch_size=4) as opened:
    opened.warm()
    yield opened


@pytest.fixture(scope="module")
def browser():
  with served.browser() as opened:
    yield opened


@pytest.fixture(scope="module")
def url(retriever):
  with served.page(retriever) as address:
    yield address


@pytest.fixture
def visit(browser, url):
  """Opens the page; whatever happens, only this host was asked and no script has failed."""
  contexts, asked, failures = [], [], []

  def opened(width=1280, height=900, **options):
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    contexts.append(context)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#results li")
    return page

  yield opened
  for context in contexts:
    context.close()
  # Pictures of a page may be part of it.
  elsewhere = [a for a in asked if not a.startswith((f"{url}/", "data:", "blob:"))]
  assert len(asked) > 10
  assert not elsewhere
  assert not failures


def upload(page, path) -> None:
  page.set_input_files("#upload input[type=file]", path)


def search(page, text: str) -> None:
  """Asks, and waits until the trail says so."""
  page.fill("#text textarea", text)
  page.press("#text textarea", "Enter")
  current(page, text)


def current(page, text: str) -> None:
  page.locator("#trail [aria-current]", has_text=text).wait_for()


def ids(page) -> list[str]:
  buttons = page.locator("#results .pick")
  return [buttons.nth(i).get_attribute("data-id") for i in range(buttons.count())]


def expected(retriever, *args, **kwargs) -> list[str]:
  return [hit.id for hit in retriever.query(*args, k=served.N, **kwargs)]


def test_the_first_view_shows_pictures_and_examples(visit):
  page = visit()
  assert len(ids(page)) == served.N
  page.locator("#results img").first.wait_for()
  page.wait_for_function("[...document.querySelectorAll('#results img')].every(i => i.complete)")
  broken = "[...document.querySelectorAll('#results img')].filter(i => !i.naturalWidth).length"
  assert page.evaluate(broken) == 0
  assert page.locator("#examples button").count() >= 2


def test_a_dialogue_of_two_turns_and_back(visit, retriever, place):
  page = visit()
  upload(page, place / "pictures" / "5.png")
  current(page, "like this")
  assert ids(page)[0] == "05"  # Itself.
  assert page.locator("#results .score").first.inner_text() == "1.000"
  assert page.input_value("#upload input[type=file]") == ""

  search(page, "is red")
  first_turn = expected(retriever, str(place / "pictures" / "5.png"), "is red")
  assert ids(page) == first_turn
  assert "12 pictures" in page.inner_text("#status")
  assert " ms" in page.inner_text("#status")

  chosen = first_turn[3]
  page.locator("#results .pick").nth(3).click()
  page.locator("#card .id", has_text=chosen).wait_for()
  current(page, "like this")
  assert page.input_value("#text textarea") == ""
  assert ids(page) == expected(retriever, id=chosen)
  search(page, "with long sleeves")
  assert ids(page) == expected(retriever, text="with long sleeves", id=chosen)
  assert page.locator("#trail li").count() == 5

  page.locator("#trail button", has_text="is red").click()
  current(page, "is red")
  assert ids(page) == first_turn
  assert page.input_value("#text textarea") == "is red"
  assert page.locator("#card .id").inner_text() == "your picture"
  # What is asked from there takes the place of what came after.
  search(page, "is blue")
  assert page.locator("#trail li").count() == 4
  assert ids(page) == expected(retriever, str(place / "pictures" / "5.png"), "is blue")

  page.click("#card button")
  page.locator("#card .card").wait_for(state="detached")
  assert ids(page) == expected(retriever, text="is blue")
  page.locator("#trail button", has_text="Start").click()
  page.locator("#trail [aria-current]", has_text="Start").wait_for()
  assert page.input_value("#text textarea") == ""


def test_filters_and_floor(visit, retriever):
  page = visit()
  search(page, "is red")
  page.click("#filters button")
  page.get_by_label("kind").click()
  page.get_by_role("option", name="dress").click()
  page.wait_for_function("document.querySelectorAll('#results li').length === 3")
  assert ids(page) == expected(retriever, text="is red", filter='kind == "dress"')
  page.get_by_label("price to").fill("7")
  page.wait_for_function("document.querySelectorAll('#results li').length === 2")
  among = expected(retriever, text="is red", filter='kind == "dress" and price <= 7')
  assert ids(page) == among
  assert page.locator("#trail li").count() == 2  # Refined, not another step.
  page.get_by_label("Least score").fill("0.999")
  page.locator("#status", has_text="Nothing is found").wait_for()
  page.get_by_label("Least score").fill("")
  page.locator("#results li").first.wait_for()
  assert ids(page) == among
  # Back to the beginning, where nothing was filtered.
  page.locator("#trail button", has_text="Start").click()
  page.locator("#trail [aria-current]", has_text="Start").wait_for()
  assert len(ids(page)) == served.N
  assert page.get_by_label("price to").input_value() == ""


def test_what_is_typed_meanwhile_stays(visit, retriever, monkeypatch):
  page = visit()
  go = threading.Event()
  original = retriever.query_batch

  def slow(*args, **kwargs):
    assert go.wait(30)
    return original(*args, **kwargs)

  monkeypatch.setattr(retriever, "query_batch", slow)
  page.fill("#text textarea", "is red")
  page.press("#text textarea", "Enter")
  page.fill("#text textarea", "is red with")
  go.set()
  current(page, "is red")
  assert page.input_value("#text textarea") == "is red with"


def test_a_broken_upload_is_said_and_leaves_the_page_as_it_was(visit, tmp_path):
  page = visit()
  search(page, "is red")
  before = ids(page)
  broken = tmp_path / "broken.png"
  broken.write_bytes(b"no picture")
  upload(page, broken)
  failure = page.locator("#status [role=alert]")
  failure.wait_for()
  assert "The file cannot be used: not a picture of these formats" in failure.inner_text()
  assert ids(page) == before
  assert page.locator("#card .card").count() == 0
  search(page, "is blue")
  assert page.locator("#status [role=alert]").count() == 0


def test_a_file_that_is_too_large_is_said(visit, tmp_path):
  page = visit()
  large = tmp_path / "large.png"
  large.write_bytes(bytes(21_000_000))
  upload(page, large)
  page.get_by_text("exceed the maximum allowed size of 19.1").first.wait_for()


def test_words_that_are_not_known_are_named(visit):
  page = visit()
  search(page, "is red with zebras")
  page.locator("#status em", has_text="zebras").wait_for()


def test_names_and_texts_never_become_html(visit):
  page = visit()
  assert set(served.HOSTILE) <= set(ids(page))
  for name in served.HOSTILE:
    search(page, name)
    index = ids(page).index(name)
    page.locator("#results .pick").nth(index).click()
    page.locator("#card .id", has_text=name).wait_for()
  assert page.evaluate("window.hurt") is None
  assert page.locator("img[src=x]").count() == 0


def test_a_picture_is_pasted(visit):
  page = visit()
  page.evaluate("""async () => {
    const picture = await (await fetch(document.querySelector("#results img").src)).blob();
    const transfer = new DataTransfer();
    transfer.items.add(new File([picture], "pasted.jpg", { type: "image/jpeg" }));
    document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer }));
  }""")
  page.locator("#card .id", has_text="your picture").wait_for()
  assert ids(page)[0] is not None


def test_by_keyboard(visit):
  page = visit()
  page.locator("#results .pick").nth(4).focus()
  chosen = ids(page)[4]
  page.keyboard.press("Enter")
  page.locator("#card .id", has_text=chosen).wait_for()
  page.wait_for_function("document.activeElement.matches('#text textarea')")
  page.keyboard.type("is blue")
  page.keyboard.press("Enter")
  current(page, "is blue")


def test_where_the_model_looks(visit, retriever):
  page = visit()
  page.locator("#results .pick").nth(4).click()
  current(page, "like this")
  assert page.locator("#look").count() == 0
  search(page, "is red")
  page.click("#look")
  page.wait_for_selector("#attention img")
  words = page.locator("#attention thead th").all_inner_texts()
  assert words == ["is", "red", "all other words"]
  assert page.locator("#attention tbody").count() == 2
  assert page.locator("#attention tbody img").count() == 6
  search(page, "is blue")
  page.wait_for_selector("#attention img", state="detached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(visit, scheme):
  page = visit(width=390, height=844, color_scheme=scheme, has_touch=True, is_mobile=True)
  page.locator("#results .pick").nth(1).tap()
  current(page, "like this")
  search(page, "is red with long sleeves")
  # It is in sight, though the trail is wider than the screen.
  place = page.locator("#trail [aria-current]").bounding_box()
  assert 0 <= place["x"] <= 390 - 48
  page.click("#look")
  page.wait_for_selector("#attention img")
  assert page.evaluate("document.documentElement.scrollWidth") <= 390
  assert page.evaluate("document.querySelector('.results li').offsetWidth") > 150
  light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
  assert light == (scheme == "light")

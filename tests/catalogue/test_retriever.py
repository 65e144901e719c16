"""What a catalogue answers: the numbers of an evaluation; a sentence where it cannot."""

import concurrent.futures
import dataclasses
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from milvus_lite.server_manager import server_manager_instance
from PIL import Image

import crn_jax
from crn_jax.catalogue import encoders, indexing, model, pictures, rankers
from crn_jax.catalogue.filters import equals
from crn_jax.catalogue.retriever import Query, Retriever
from crn_jax.catalogue.store import Store
from crn_jax.errors import UserError
from crn_jax.input_pipeline.dataset import EvalSplit, Triplets
from crn_jax.methods import registry
from crn_jax.parallel import AXIS, DataParallel
from crn_jax.retrieval.encode import Encoder
from crn_jax.workdir import run
from tests.catalogue import made

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

N = 30
# Of cosines; batches of another size are summed in another order (tests/retrieval/test_encode.py).
TOLERANCE = 4e-6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A run, a manifest of N pictures (two of them equal), and their catalogue."""
  root = tmp_path_factory.mktemp("catalogue")
  made.trained(root / "run")
  made.folder(root / "pictures", N - 1)
  (root / "pictures" / f"{N - 1}.png").write_bytes((root / "pictures" / "3.png").read_bytes())
  lines = [f"{i:02d},pictures/{i}.png,{'dress' if i % 3 else 'shirt'},{i}" for i in range(N)]
  (root / "list.csv").write_text("\n".join(["id,path,kind,price", *lines]))
  index(root)
  return root


def index(root: pathlib.Path, name: str = "a.db") -> None:
  with Store(root / name, create=True) as store:
    ready = encoders.Encoders(model.load(root / "run"))
    indexing.update(store, ready, root / "list.csv")


@pytest.fixture(scope="module")
def closed(place):
  """Another index of the same pictures, which no process has open."""
  index(place, "b.db")
  return place / "b.db"


@pytest.fixture(scope="module")
def loaded(place):
  return model.load(place / "run")


@pytest.fixture(scope="module")
def retriever(place):
  with Retriever.open(place / "a.db", batch_size=4) as opened:
    yield opened


def path(place, i: int) -> str:
  return str(place / "pictures" / f"{i}.png")


TEXTS = ["is red", "blue with long sleeves", "no shirt", "is more green and a dress", "less"]


class TestAnswers:
  def test_are_those_of_an_evaluation(self, place, loaded, retriever):
    """Of all three sorts of queries: every picture of the catalogue with its score."""
    config = run.load_config(place / "run")
    config.eval.batch_size = 8
    parallel = DataParallel.create("shard_map")
    encoder = Encoder.create(registry.create(config, len(loaded.tokenizer), AXIS), parallel)
    references = np.arange(len(TEXTS), dtype=np.int32)
    split = EvalSplit(
      "all",
      tuple(f"{i:02d}" for i in range(N)),
      tuple(path(place, i) for i in range(N)),
      Triplets(references, references, tuple((text,) for text in TEXTS)),
      {"all": np.arange(N, dtype=np.int32)},
    )
    found = encoder.encode(parallel.replicate(loaded.variables), split, loaded.tokenizer)
    for i, text in enumerate(TEXTS):
      for vector, query in (
        (found.composed[i], {"image": path(place, i), "text": text}),
        (found.images[i], {"image": path(place, i)}),
        (found.text_only[i], {"text": text}),
      ):
        hits = retriever.query(**query, k=N)
        assert len(hits) == N
        scores = dict(zip(split.image_ids, found.images @ vector, strict=True))
        np.testing.assert_allclose(
          [hit.score for hit in hits], [scores[hit.id] for hit in hits], rtol=0, atol=TOLERANCE
        )
        assert all(a.score >= b.score - 1e-6 for a, b in zip(hits, hits[1:], strict=False))

  def test_a_batch_is_its_queries_one_by_one(self, place, retriever):
    """More than a compiled batch, of all sorts."""
    queries = [
      Query(text="is red"), Query(image=path(place, 1)), Query(path(place, 2), text="is blue"),
      Query(id="04"), Query(id="05", text="is red"), Query(text="is red", filter='kind == "shirt"'),
      Query(id="07", filter="price < 20"), Query(image=path(place, 8), text="less"),
      Query(text="no", filter='kind == "shirt"'),
    ]  # fmt: skip
    together = retriever.query_batch(queries, k=6)
    for query, hits in zip(queries, together, strict=True):
      alone = retriever.query(
        query.image, query.text, k=6, filter=query.filter, id=query.id
      )  # fmt: skip
      assert [hit.id for hit in hits] == [hit.id for hit in alone]
      np.testing.assert_allclose(
        [hit.score for hit in hits], [hit.score for hit in alone], rtol=0, atol=TOLERANCE
      )

  def test_the_store_ranks_alike(self, place, monkeypatch, retriever):
    queries = [Query(text="is red"), Query(image=path(place, 3)), Query(id="03", text="is blue")]
    ours = retriever.query_batch(queries, k=8)
    monkeypatch.setattr(retriever, "_ranker", rankers.StoreRanker(retriever._store))
    theirs = retriever.query_batch(queries, k=8)
    for found, expected in zip(ours, theirs, strict=True):
      assert [hit.id for hit in found] == [hit.id for hit in expected]
      np.testing.assert_allclose(
        [h.score for h in found], [h.score for h in expected], rtol=0, atol=TOLERANCE
      )

  def test_equal_pictures_come_in_the_order_of_their_ids(self, place, retriever):
    first, second = retriever.query(path(place, 3), k=2)
    assert (first.id, second.id) == ("03", f"{N - 1}")
    assert first.score == pytest.approx(1, abs=1e-6)

  def test_a_picture_of_the_catalogue_is_not_its_own_answer(self, place, retriever):
    for text in ("", "is red"):
      hits = retriever.query(id="03", text=text, k=N)
      assert len(hits) == N - 1
      assert "03" not in {hit.id for hit in hits}
    assert retriever.query(id="03")[0].id == f"{N - 1}"

  def test_a_hit_says_all_that_is_known(self, place, retriever):
    (hit,) = retriever.query(path(place, 4), k=1)
    assert dataclasses.asdict(hit) | {"score": 1} == {
      "id": "04", "path": path(place, 4), "score": 1, "width": 40, "height": 48,
      "metadata": {"kind": "dress", "price": 4},
    }  # fmt: skip

  def test_filters_and_the_floor(self, place, retriever):
    hits = retriever.query(text="is red", k=N, filter=equals("kind", "shirt"))
    assert {hit.id for hit in hits} == {f"{i:02d}" for i in range(0, N, 3)}
    floor = hits[4].score
    assert (
      retriever.query(text="is red", k=N, filter=equals("kind", "shirt"), min_score=floor)
      == (hits[:5])
    )
    assert retriever.query(text="is red", filter=equals("kind", 'no "such\\')) == []
    assert retriever.query(text="is red", min_score=2.0) == []

  @pytest.mark.parametrize("sort", ["str", "path", "bytes", "image", "array", "sideways"])
  def test_a_picture_may_be_given_in_many_ways(self, sort, place, retriever):
    expected = retriever.query(path(place, 5), "is red", k=3)
    given = {
      "str": lambda p: p, "path": pathlib.Path, "bytes": lambda p: pathlib.Path(p).read_bytes(),
      "image": Image.open, "array": lambda p: np.asarray(Image.open(p)), "sideways": self.turned,
    }[sort](path(place, 5))  # fmt: skip
    assert retriever.query(given, "is red", k=3) == expected

  def turned(self, given: str) -> Image.Image:
    image = Image.open(given).transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x0112] = 6
    return image

  def test_pictures_of_other_sizes_are_those_of_an_evaluation(self, retriever):
    """Resized to the short side, the middle of it."""
    wide = np.asarray(Image.effect_noise((90, 40), 80).convert("RGB"))
    middle = np.asarray(Image.fromarray(wide).resize((72, 32), Image.Resampling.BILINEAR))[:, 20:52]
    np.testing.assert_array_equal(retriever._encoders.fit(wide), middle)


class TestMistakes:
  @pytest.mark.parametrize(
    ("query", "message"),
    [
      ({}, "nothing to look for: give a picture, a text, or both"),
      ({"text": "  \n"}, "nothing to look for"),
      ({"text": "x" * 1_001}, "the text has 1,001 characters; at most 1,000"),
      ({"id": "absent"}, "id 'absent': no such picture in the catalogue"),
      ({"id": '" or key != "'}, "no such picture"),
      ({"id": "03", "image": b"x"}, "as image or by its id, not both"),
      ({"image": "absent.png"}, "^absent.png: no such file"),
      ({"image": b"<html>"}, "^the picture: not a picture of these formats"),
      ({"image": b"x" * (pictures.MAX_UPLOAD + 1)}, "the picture: larger than 20 MB"),
      ({"image": np.zeros((4, 4), np.uint8)}, r"expected \[h, w, 3\] uint8, got \[4, 4\] uint8"),
      ({"image": Image.new("RGB", (1, 500))}, "the picture: too elongated"),
      ({"text": "is red", "filter": "kind = shirt"}, "filter 'kind = shirt': not understood"),
      ({"text": "is red", "k": 0}, "k: expected 1 to 1,000, got 0"),
      ({"text": "is red", "k": 1_001}, "k: expected 1 to 1,000, got 1001"),
    ],
  )
  def test_one_sentence(self, query, message, retriever):
    with pytest.raises(UserError, match=message) as error:
      retriever.query(**query)
    assert "\n" not in str(error.value)

  def test_they_do_not_touch_the_others_of_a_batch(self, place, retriever):
    good, bad = Query(text="is red"), [
      Query(), Query(image=b"x"), Query(text="is red", filter="("), Query(id="absent"),
    ]  # fmt: skip
    answers = retriever.query_batch([bad[0], good, bad[1], bad[2], good, bad[3]], k=3)
    assert [isinstance(answer, UserError) for answer in answers] == [True, False] + [
      True, True, False, True,
    ]  # fmt: skip
    assert [h.id for h in answers[1]] == [h.id for h in answers[4]]
    assert retriever.query_batch([], k=3) == []
    assert all(isinstance(a, UserError) for a in retriever.query_batch(bad, k=3))

  def test_a_model_without_finite_vectors(self, retriever, monkeypatch):
    answer = retriever._encoders.answer

    def broken(*args):
      found = answer(*args)
      return dataclasses.replace(found, text=np.full_like(found.text, np.nan))

    monkeypatch.setattr(retriever._encoders, "answer", broken)
    with pytest.raises(UserError, match="run: the model gives no finite vector"):
      retriever.query(text="is red")

  def test_a_picture_that_changed_since(self, place, retriever):
    """Its vector is known, but composing needs the picture itself."""
    file = pathlib.Path(path(place, 6))
    before = file.read_bytes()
    try:
      for change, reason in (
        (lambda: made.picture(file, 99), "changed since it was indexed; run --mode=index again"),
        (file.unlink, "no such file"),
      ):
        change()
        with pytest.raises(UserError, match=rf"^06: {reason}"):  # Who asks learns no path.
          retriever.query(id="06", text="is red")
        assert len(retriever.query(id="06")) == 10
    finally:
      file.write_bytes(before)


class TestOpening:
  def test_another_model_is_refused(self, closed, tmp_path):
    other = made.trained(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=f"made with another model .*{re.escape(str(other))}"):
      Retriever.open(closed, model=other)
    Retriever.open(closed).close()  # Everything was given back.

  def test_a_moved_model_is_the_same(self, closed, place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "moved")
    with Retriever.open(closed, model=tmp_path / "moved") as moved:
      assert len(moved.query(text="is red", k=3)) == 3

  @pytest.mark.parametrize(
    ("change", "same"),
    [
      ({"model.remat": "full"}, True), ({"model.pretrained": "/elsewhere"}, True),
      ({"eval.batch_size": 3}, True), ({"data.root": "/elsewhere"}, True),
      ({"data.resize": 40}, False), ({"model.dtype": "bfloat16"}, False),
      ({"data.markers": "words"}, False),
    ],
  )  # fmt: skip
  def test_the_digest_is_of_what_vectors_depend_on(self, change, same, place, loaded, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    config = run.load_config(tmp_path / "run")
    config.update_from_flattened_dict(change)
    run.save_config(config, tmp_path / "run")
    assert (model.load(tmp_path / "run").digest == loaded.digest) == same

  def test_other_numerics_are_another_digest(self, place, loaded, monkeypatch):
    """As of bfloat16 when more of it became float32; float32 keeps its name, and old indexes."""
    assert loaded.method.numerics == "float32"
    monkeypatch.setattr(type(loaded.method), "numerics", "float32, otherwise")
    assert model.load(place / "run").digest != loaded.digest

  @pytest.mark.parametrize(
    ("name", "message"),
    [
      ("absent", "absent: no such folder; a model is"),
      ("pictures", "pictures: holds neither a trained run"),
    ],
  )
  def test_what_is_no_model(self, name, message, place):
    with pytest.raises(UserError, match=message):
      model.load(place / name)

  def test_a_server_gives_the_same(self, closed, retriever):
    """By the address at which Milvus Lite listens itself; there the store ranks."""
    queries = [
      Query(text="is red"), Query(id="03", text="is blue"), Query(id="04"),
      Query(text="is red", filter='kind == "shirt"'),
    ]  # fmt: skip
    with Store(closed):
      address = server_manager_instance.start_and_get_uri(str(closed))
      with Retriever.open(address, batch_size=4) as served:
        assert isinstance(served._ranker, rankers.StoreRanker)
        found = served.query_batch(queries, k=5)
    for ours, theirs in zip(retriever.query_batch(queries, k=5), found, strict=True):
      assert [hit.id for hit in ours] == [hit.id for hit in theirs]

  def test_a_store_without_this_catalogue(self, closed):
    with pytest.raises(UserError, match="holds no catalogue other; make it with --mode=index"):
      Retriever.open(closed, collection="other")

  def test_importing_the_package_starts_nothing(self):
    code = (
      "import sys, crn_jax\n"
      "started = {'jax', 'tensorflow', 'pymilvus', 'numpy'} & set(sys.modules)\n"
      "sys.exit(f'started {started}' if started else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert crn_jax.Retriever is Retriever
    with pytest.raises(AttributeError, match="no attribute 'Retreiver'"):
      crn_jax.Retreiver  # noqa: B018


def test_what_the_page_is_made_of(place, retriever):
  assert len(retriever) == N
  assert retriever.about.facets == {
    "kind": {"values": ["dress", "shirt"]}, "price": {"least": 0, "greatest": N - 1},
  }  # fmt: skip
  assert retriever.get("07").path == path(place, 7)
  assert len({row.id for row in retriever.sample(6)}) == 6
  assert retriever.unknown_words("is Red, with sparkles and sparkles") == ["sparkles"]
  assert retriever.unknown_words(" ") == []
  retriever.warm()
  attention = retriever.attention(Query(id="07", text="is red"))
  assert attention.words == ["<BOS>", "is", "red", "<EOS>"]
  assert {part: maps.shape for part, maps in attention.maps.items()} == {
    "local": (4, 4, 4), "global": (4, 4, 4),
  }  # fmt: skip
  assert attention.notes.keys() == attention.maps.keys()
  # Over words and over positions, as the notes say.
  np.testing.assert_allclose(attention.maps["local"].sum(0), 1, atol=1e-5)
  np.testing.assert_allclose(attention.maps["global"].sum((1, 2)), 1, atol=1e-5)
  assert retriever.attention(Query(id="07")) is None
  assert retriever.attention(Query(text="is red")) is None


def test_threads_may_ask_together(place, retriever):
  queries = [Query(image=path(place, i % 5), text="is red") for i in range(20)]
  expected = [retriever.query(q.image, q.text, k=3) for q in queries]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda q: retriever.query(q.image, q.text, k=3), queries))
  assert found == expected

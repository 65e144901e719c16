"""Two ways to rank, the same answers."""

import numpy as np
import pytest

from crn_jax.catalogue import rankers
from crn_jax.catalogue.store import Store
from tests.catalogue import made

N = 60


@pytest.fixture
def store(tmp_path):
  with Store(tmp_path / "a.db", create=True) as store:
    store.create(made.about())
    rows = [made.row(str(i), kind="even" if i % 2 == 0 else 'o"dd', n=i) for i in range(N)]
    store.write(rows, made.unit_vectors(N, 0), [])
    store.flush()
    yield store


def matrix(store, block_size: int = 4) -> rankers.MatrixRanker:
  return rankers.MatrixRanker(store, store.about(), store.count(), block_size)


@pytest.mark.parametrize("k", [1, 7, 59, 60, 100])
def test_both_give_the_same(store, k):
  filters = ["", 'kind == "even"', "n < 5", "", r'kind == "o\"dd" and n >= 30', "n > 1000"]
  queries = made.unit_vectors(len(filters), 1)
  ours, theirs = (r.rank(queries, k, filters) for r in (matrix(store), rankers.StoreRanker(store)))
  sizes = [N, N // 2, 5, N, 15, 0]
  for found, expected, size in zip(ours, theirs, sizes, strict=True):
    assert len(found) == min(k, size)
    assert [key for key, _ in found] == [key for key, _ in expected]
    # Two sums of 8 products of float32 numbers up to 1, in another order: 8 roundings of 2^-24.
    np.testing.assert_allclose(
      [s for _, s in found], [s for _, s in expected], rtol=0, atol=8 * 2.0**-24
    )


def test_scores_are_cosines(store):
  rows, vectors = list(store.rows()), dict(zip(*(list(x) for x in zip(*(
    pair for keys, values in store.vectors(made.DIM) for pair in zip(keys, values, strict=True)
  ), strict=True)), strict=True))  # fmt: skip
  assert len(rows) == N
  (query,) = made.unit_vectors(1, 5).astype(np.float64)
  exact = {key: float(vector.astype(np.float64) @ query) for key, vector in vectors.items()}
  best = sorted(exact, key=exact.get, reverse=True)[:10]
  for ranker in (matrix(store), rankers.StoreRanker(store)):
    (found,) = ranker.rank(query[None].astype(np.float32), 10, [""])
    assert [key for key, _ in found] == best
    # As above, and the query's own rounding.
    np.testing.assert_allclose([s for _, s in found], [exact[k] for k in best], atol=16 * 2.0**-24)


def test_small_embedded_catalogues_are_ranked_in_memory(store, monkeypatch):
  assert isinstance(rankers.create(store, store.about(), 4), rankers.MatrixRanker)
  monkeypatch.setattr(rankers, "MATRIX_ROWS", N - 1)
  assert isinstance(rankers.create(store, store.about(), 4), rankers.StoreRanker)
  monkeypatch.setattr(rankers, "MATRIX_ROWS", N)
  store.cache = None  # As on a server.
  assert isinstance(rankers.create(store, store.about(), 4), rankers.StoreRanker)


def test_an_empty_catalogue_is_ranked(tmp_path):
  with Store(tmp_path / "a.db", create=True) as store:
    store.create(made.about())
    ranker = rankers.create(store, store.about(), 4)
    assert ranker.rank(made.unit_vectors(2, 0), 3, ["", "n > 1"]) == [[], []]


def test_the_matrix_is_loaded_from_the_store_once(store, monkeypatch):
  queries = made.unit_vectors(3, 1)
  expected = matrix(store).rank(queries, 5, [""] * 3)

  def read_again(dim):
    raise AssertionError("the vectors were read from the store again")

  monkeypatch.setattr(store, "vectors", read_again)
  assert matrix(store).rank(queries, 5, [""] * 3) == expected


@pytest.mark.parametrize("damage", ["generation", "about.json", "half", "count"])
def test_a_matrix_that_is_not_of_the_store_is_not_used(store, damage):
  matrix(store)
  folder = store.cache / "matrix"
  if damage == "generation":
    store.describe(made.about(generation="h"))
  elif damage == "about.json":
    (folder / "about.json").write_text("{")
  elif damage == "half":
    (folder / "about.json").unlink()
  if damage == "count":
    store.delete([made.row("0").key])
  else:
    np.save(folder / "vectors.npy", np.zeros((N, made.DIM), np.float32))
  (vector,) = store.get_vectors([made.row("1").key]).values()
  (((key, score),),) = matrix(store).rank(vector[None], 1, [""])
  assert key == made.row("1").key
  assert score == pytest.approx(1, abs=1e-6)

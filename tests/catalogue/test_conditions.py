"""Filters from values: they say what is meant, whatever the values are."""

import pytest

from crn_jax.catalogue.page import conditions
from crn_jax.catalogue.store import Store
from crn_jax.errors import UserError
from tests.catalogue import made

FACETS = {"kind": {"values": ["dress", "shirt"]}, "price": {"least": 1, "greatest": 9},
          "sale": {"values": [False, True]}, "note": {}}  # fmt: skip


@pytest.mark.parametrize(
  ("where", "expected"),
  [
    ({}, ""),
    ({"kind": []}, ""),
    ({"price": {}}, ""),
    ({"price": {"least": None, "greatest": None}}, ""),
    ({"kind": ["dress"]}, '(kind == "dress")'),
    ({"kind": ["dress", "shirt"]}, '(kind == "dress" or kind == "shirt")'),
    ({"sale": [True]}, "(sale == true)"),
    ({"price": {"least": 2}}, "price >= 2"),
    ({"price": {"least": 2.5, "greatest": 3}}, "price >= 2.5 and price <= 3"),
    ({"kind": ["dress"], "price": {"greatest": 3}}, '(kind == "dress") and price <= 3'),
    ({"note": ['" or kind != "']}, '(note == "\\" or kind != \\"")'),
  ],
)
def test_expressions(where, expected):
  assert conditions.expression(FACETS, where) == expected


@pytest.mark.parametrize(
  ("where", "message"),
  [
    ("kind", "expected an object"),
    (["kind"], "expected an object"),
    (None, "expected an object"),
    ({"brand": ["x"]}, "no field 'brand' in this catalogue; there are: kind, price, sale, note"),
    ({"kind == kind or kind": ["x"]}, "no field"),
    ({"kind": "dress"}, "kind: expected a list"),
    ({"kind": [["dress"]]}, "kind: expected a list"),
    ({"kind": [None]}, "kind: expected a list"),
    ({"kind": ["x"] * 101}, "at most 100 values"),
    ({"kind": ["x" * 1_001]}, "kind: expected a list"),
    ({"price": {"least": "1 or 1 == 1"}}, "of numbers"),
    ({"price": {"least": True}}, "of numbers"),
    ({"price": {"least": float("nan")}}, "of numbers"),
    ({"price": {"least": float("inf")}}, "of numbers"),
    ({"price": {"least": 10**30}}, "of numbers"),
    ({"price": {"most": 1}}, "of numbers"),
  ],
)
def test_what_is_no_filter_is_said(where, message):
  with pytest.raises(UserError, match="filters") as error:
    conditions.expression(FACETS, where)
  assert message in str(error.value)


def test_milvus_understands_them_and_nothing_else_is_let_through(tmp_path):
  hostile = ['"', "\\", '\\"', '" or 1 == 1 or kind == "', "a\nb", "{x}", "%", "é漢😀"]
  rows = [made.row(str(i), kind=kind, price=i, sale=i % 2 == 0) for i, kind in enumerate(hostile)]
  facets = FACETS | {"kind": {"values": hostile}}
  with Store(tmp_path / "a.db", create=True) as store:
    store.create(made.about())
    store.write(rows, made.unit_vectors(len(rows), 0), [])

    def found(where) -> set[str]:
      keys = store.matching(conditions.expression(facets, where))
      return {row.metadata["kind"] for row in store.get(keys).values()}

    for kind in hostile:
      assert found({"kind": [kind]}) == {kind}
    assert found({"kind": hostile[:3]}) == set(hostile[:3])
    assert found({"sale": [True]}) == set(hostile[::2])
    assert found({"price": {"least": 2, "greatest": 3.5}}) == set(hostile[2:4])
    assert found({"price": {"least": 2}, "sale": [False]}) == set(hostile[3::2])

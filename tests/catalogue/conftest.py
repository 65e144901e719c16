"""Catalogues are made many times here."""

import functools

import pytest
from pymilvus.client import grpc_handler


@pytest.fixture(autouse=True)
def prompt(monkeypatch):
  """Milvus Lite has an index at once; its client would look for it after half a second only."""
  original = grpc_handler.GrpcHandler.wait_for_creating_index

  @functools.wraps(original)
  def wait(*args, **kwargs):
    with monkeypatch.context() as patch:
      patch.setattr(grpc_handler.time, "sleep", lambda seconds: None)
      return original(*args, **kwargs)

  monkeypatch.setattr(grpc_handler.GrpcHandler, "wait_for_creating_index", wait)

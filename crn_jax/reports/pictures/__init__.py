"""Drawings: retrieval grids, attention, curves. They take plain values and know no model."""

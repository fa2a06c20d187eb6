"""Measure: our norms, their peers and a copy of the same bytes, on this machine."""

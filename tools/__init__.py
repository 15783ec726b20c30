"""Tools for finished runs, and for timing. Run one as `python -m tools.NAME` at the root."""

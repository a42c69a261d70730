"""Thin adapters for other libraries; each is importable only where its library is."""

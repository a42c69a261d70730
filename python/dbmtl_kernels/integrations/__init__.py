"""Thin adapters for other libraries; each module needs its library, so nothing is imported here."""

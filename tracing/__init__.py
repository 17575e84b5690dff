"""Captures profiles and IR, stores them as data, reports and diffs them."""

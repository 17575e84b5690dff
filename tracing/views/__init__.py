"""Renders a capture for people: a page, a trace for Perfetto, a flame of text."""

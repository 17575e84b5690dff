"""Rewrites the `llmir` ops, for a target, into dispatches."""

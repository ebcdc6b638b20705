"""Serves a run: real-time scores over HTTP, with events that survive."""

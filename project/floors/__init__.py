"""Floors: what counting and ordinary recommenders can do, on the same rows and strictly earlier features."""

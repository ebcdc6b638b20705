"""Serves a calibrated run over HTTP."""

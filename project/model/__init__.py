"""Backbone, exit heads, optimiser and the LightningModule."""

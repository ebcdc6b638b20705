"""Evaluation: from a table of scores to numbers with intervals, beside the floors."""

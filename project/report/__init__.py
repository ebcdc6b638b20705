"""The report of a run: result files in, text, tables and pictures out."""

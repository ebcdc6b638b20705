"""Verb `ablate`: one list of variants of a configuration, each trained once, and one table of what they are worth."""

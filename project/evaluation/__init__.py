"""From a table of scores to numbers with intervals, beside the baselines."""

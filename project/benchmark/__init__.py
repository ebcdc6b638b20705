"""Speed as ratios: all configurations in turns, in one run."""

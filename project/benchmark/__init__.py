"""Speed as ratios: all contenders in turns, in one run."""

"""Speed as ratios, both sides measured in turns in one run."""

"""Ranking requests: the best k of N candidates, by every policy, beside full depth and static depths."""

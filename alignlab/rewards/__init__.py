"""What the scores of a reward model are worth: statistics of pairs, benchmarks, pools, comparisons.

Everything here is NumPy on numbers that are known already; who makes them is :mod:`alignlab.measuring.scoring`.
"""

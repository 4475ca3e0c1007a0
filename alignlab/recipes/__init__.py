"""Recipes: published experiments as stages, settings and measures, and the bands that a run of them must fall into."""

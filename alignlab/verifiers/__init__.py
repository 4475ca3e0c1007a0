"""Judges of generated text: ``(verify, completion) -> {measure: number}``, ``correct`` among them.

``verify`` comes with the row (``Sample.verify``).  The judge of the built-in world is ``data/world.py:measure``.
"""

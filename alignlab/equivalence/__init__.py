"""Two ways to do one thing, trained side by side: what ``alignlab verify`` and the invariant suite of the tests run."""

"""From files, groups and words typed to one checked configuration: who set each key, and what a run read of it."""

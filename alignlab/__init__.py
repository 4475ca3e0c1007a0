"""alignlab: alignment training for language models, every objective on one exact loop."""

__version__ = "0.1.0"

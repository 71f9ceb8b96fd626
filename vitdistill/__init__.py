"""vitdistill turns a big Vision Transformer into a small, fast one for the least compute."""

__version__ = "0.1.0"

"""Images in, batches out: sources, decoding, views, mixing and loaders, all deterministic for any
number of workers.
"""

"""Images as batches: datasets, prefetching, and caches of decoded images."""

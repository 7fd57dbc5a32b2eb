"""The kinds of parallelism, one file or folder each."""

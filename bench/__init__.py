"""Benchmarks: `make bench`, see NOTES.md; and `python -m bench.frechet --help`."""

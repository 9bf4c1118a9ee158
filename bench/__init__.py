"""Benchmarks of ksmcore: `make bench`, explained in README.md. Neither package nor tests."""

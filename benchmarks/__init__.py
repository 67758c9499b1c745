"""Claims about speed and memory, each measured beside its peer in one run: ``python -m benchmarks cpu C1``."""

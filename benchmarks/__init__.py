"""Speed, memory and compiled size, each beside the strongest alternative: pytest benchmarks --benchmark-only."""

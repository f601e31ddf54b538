"""What benchmarks compute and how they talk to their workers; nothing is timed here."""

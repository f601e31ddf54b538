"""Models that were trained, fetched from a package registry."""

"""From a lowered Program to the files of an artifact, one folder a backend."""

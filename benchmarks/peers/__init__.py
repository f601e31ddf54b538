"""infc beside its peers: one run, turn by turn, each contestant in an environment of its own."""

"""What this machine gives, what an artifact makes of it, and how near the two are."""

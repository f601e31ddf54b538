"""What programs and artifacts hold and how they differ: facts, told as text, JSON or a page."""

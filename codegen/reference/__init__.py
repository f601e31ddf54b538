"""The reference backend: the program itself, interpreted with torch."""

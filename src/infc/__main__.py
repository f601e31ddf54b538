"""Runs the command line: `python -m infc`."""

from .driver.cli import main

if __name__ == "__main__":
    main()

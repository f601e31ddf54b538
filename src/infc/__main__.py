"""Runs the command line: `infc`, and `python -m infc`."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """The entry point of the console script."""
    # Whoever interrupts before there is anything to clean up or to say gets no traceback for it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .driver.cli import main

    main()


if __name__ == "__main__":
    main()

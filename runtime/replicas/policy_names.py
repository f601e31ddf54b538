"""The names of routing policies, for who only lists them."""

from typing import Literal

PolicyName = Literal["least-loaded", "round-robin", "random"]

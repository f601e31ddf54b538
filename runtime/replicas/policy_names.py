"""The names of routing policies, for who only lists them; the first is the default."""

from typing import Literal

PolicyName = Literal["prefix", "least-loaded", "round-robin", "random"]

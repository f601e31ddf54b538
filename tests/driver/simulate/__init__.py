"""The simulator: properties of any fleet, and what theory says of simple ones."""

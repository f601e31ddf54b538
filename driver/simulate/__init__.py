"""A simulator of several engines behind a front: discrete events, real routing policies."""

"""The ground every room stands on: types, ops, programs, artifacts, targets and errors."""

"""The tests mirror the rooms; `e2e` is for whole paths."""

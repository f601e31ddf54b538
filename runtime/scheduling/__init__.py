"""Scheduling: batches, KV blocks, and the steps that an executor runs."""

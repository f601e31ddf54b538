"""infc on Ray: serving, and batches."""

"""From an artifact to tokens: blocks, scheduler, sampler, engine, executors, server."""

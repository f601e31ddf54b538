"""The Python interface: `LLM`, `AsyncLLM`, and what their methods take and return."""

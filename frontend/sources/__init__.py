"""Where a model comes from: a Hugging Face directory, or one GGUF file."""

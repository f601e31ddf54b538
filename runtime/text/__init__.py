"""Text: tokenizers, detokenizers, and chat templates."""

"""Quality, size and speed of formats on trained models, beside llama.cpp's of the same weights."""

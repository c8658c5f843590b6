"""The recipe that trained the default model: PyTorch, Hugging Face folders in and out. See README.md."""

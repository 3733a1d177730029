"""Merge fine-tuned models from the Hugging Face Hub (temporary)."""
__version__ = "0.1.0"

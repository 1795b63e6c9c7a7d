"""Audit finetuned language models by the movement of their sparse-autoencoder features."""

__version__ = "0.1.0"

"""Fused SAE encode + top-k."""

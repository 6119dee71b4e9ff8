"""Fused self-attention and spectral normalization for Self-Attention GANs, with a zoo of pretrained models."""

__version__ = "0.1.0"

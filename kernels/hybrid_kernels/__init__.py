"""Kernels for training, one folder an operation, one file a variant; imports nothing of `hybrid`.

Each operation has `ref.py`, the definition: slow, obvious, also in float64. Every other variant is compared
with it. Importing this package imports neither Triton nor NKI.
"""

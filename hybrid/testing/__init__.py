"""Shipped for whoever adds a variant of a seam: one conformance kit a seam, and stand-ins for hardware.

Nothing here is imported by a training job.
"""

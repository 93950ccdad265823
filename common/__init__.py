"""What the papers share: objectives, attacks, data, networks, training and evaluation."""

PROJECT = "robust-image-classification"
"""Name of the distribution; packages of papers know this ``common`` by it."""

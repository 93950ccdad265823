"""All methods in one backbone, under one protocol: ``make robustness``."""

"""How often the audit is right: a zoo of masked and honest networks, see ``zoo.py``."""

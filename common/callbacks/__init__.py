"""Attacks, weight perturbation, evaluation, checkpoints and monitoring as Lightning callbacks."""

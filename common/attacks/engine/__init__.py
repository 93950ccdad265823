"""The attack-side copy of a network: folded, laid out and compiled for input gradients."""

from common.attacks.engine.network import AttackEngine

__all__ = ["AttackEngine"]

"""Ours against installed peers and the bare hand-written loop, as ratios within one run."""

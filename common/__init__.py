"""What the papers share: objectives, attacks, data, networks, training and evaluation."""

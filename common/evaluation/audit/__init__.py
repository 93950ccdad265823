"""Whether a robustness figure may come from the attacks' failure: the gradient-masking audit."""

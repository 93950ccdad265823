"""How the saddle point meets Lightning: attacks, weight perturbation, evaluation, monitoring."""

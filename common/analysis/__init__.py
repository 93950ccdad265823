"""Claims of a paper tested on results, with figures and costs."""

"""Result files: what they hold, where they come from, and the tables made of them."""

"""``make gpu``: what has to be known of this project on a GPU, in one command with a time limit."""

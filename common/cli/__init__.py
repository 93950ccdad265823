"""The command line: configurations, runs, trainers and their messages."""

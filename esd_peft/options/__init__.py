"""The options: one class for each command and for each group of options, and how they are read."""

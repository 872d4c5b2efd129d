"""What surrounds a training run: defaults, checks, the memory plan, a second try on less memory, and its result."""

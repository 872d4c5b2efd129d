"""The surroundings of a training run: defaults, checks, the memory plan, a second try on less memory, its result."""

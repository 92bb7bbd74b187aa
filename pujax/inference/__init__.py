"""A finished model at work: it answers, is served and is evaluated."""

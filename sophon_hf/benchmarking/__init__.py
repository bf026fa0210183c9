"""Benchmark a protection in one call, on packaged pairs of domains."""

# Their names, which the command line needs before anything is imported.
PAIRS = ("letters", "digits", "ages")
BUDGETS = ("small", "full")

"""Attacks: sweeps of fine-tuning strategies, the suite that runs them, and the score of what they reach."""

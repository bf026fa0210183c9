"""Domains (what is learned from) and streams (in which order)."""

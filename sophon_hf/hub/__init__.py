"""Publish a protected model on the Hub, and audit what is claimed of one."""

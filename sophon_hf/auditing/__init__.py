"""Check what a published model claims."""

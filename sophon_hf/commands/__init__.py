"""What `sophon-hf` does for each of its commands."""

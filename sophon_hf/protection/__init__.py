"""Algorithm 1 of the SOPHON paper, and what goes beyond it."""

"""`python -m sophon_hf.cli`, for `accelerate launch`."""

from sophon_hf.cli.main import main

main()

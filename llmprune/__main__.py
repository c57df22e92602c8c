"""`python -m llmprune`, also under torchrun and accelerate launch."""

from .cli import main

main()

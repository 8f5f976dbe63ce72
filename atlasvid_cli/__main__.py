"""`python -m atlasvid_cli`, which is what `accelerate launch -m` starts."""

from .cli import main

main()

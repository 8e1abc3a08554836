"""`python -m hf_sam`, and what `accelerate launch -m hf_sam` starts in every process: see [`hf_sam.commands`]."""

from .commands import main

if __name__ == "__main__":
    raise SystemExit(main())

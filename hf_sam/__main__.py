"""Entry point of `python -m hf_sam` and `accelerate launch -m hf_sam`; see [`hf_sam.commands`]."""

from .commands import main

if __name__ == "__main__":
    raise SystemExit(main())

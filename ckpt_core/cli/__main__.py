"""`python -m ckpt_core.cli` is `ckpt`."""

from ckpt_core.cli import entry

if __name__ == "__main__":
    entry()

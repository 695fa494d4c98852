"""Publishing exports: staged whole, compared by digest, promoted in one commit, tagged, and taken back in another.

A target is a repository on the Hub, a directory or a bucket. The same client speaks to huggingface.co and to
`ckpt_core.testing.hub_server`; importing this loads neither torch, transformers nor huggingface_hub.
"""

from ckpt_core.hub.card import render_card
from ckpt_core.hub.connection import child_environment
from ckpt_core.hub.publication import Candidate, discard, promote, publish, stage
from ckpt_core.hub.releases import Release
from ckpt_core.hub.serving import download, roll_back, served

__all__ = [
    "Candidate",
    "Release",
    "child_environment",
    "discard",
    "download",
    "promote",
    "publish",
    "render_card",
    "roll_back",
    "served",
    "stage",
]

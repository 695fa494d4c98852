"""Publishing exports to the Hub: one atomic commit, read back before its version tag is set.

The same client speaks to huggingface.co and to `ckpt_core.testing.hub_server`; importing this loads neither torch,
transformers nor huggingface_hub.
"""

from ckpt_core.hub.card import render_card
from ckpt_core.hub.connection import child_environment
from ckpt_core.hub.publication import publish
from ckpt_core.hub.releases import Release, download, latest_release

__all__ = ["Release", "child_environment", "download", "latest_release", "publish", "render_card"]

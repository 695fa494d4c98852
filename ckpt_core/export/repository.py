"""The files of a model on the Hub: all that is carried, without its weights."""

# huggingface_hub is only partly annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import glob
from pathlib import Path

from ckpt_core.errors import NotACheckpointError
from ckpt_core.export.carried import CONFIG_NAME, MODULES_NAME, choose, module_directories
from ckpt_core.export.foreign import foreign_errors


def download(name: str, what: str) -> tuple[Path, tuple[str, ...]]:
    """Get the config and the carried files of a repository; from the cache where there is no Hub.

    Args:
        name: of the repository.
        what: it is wanted for, for errors.

    Returns:
        Their directory, and what is to be said of files that were left on the Hub.

    Raises:
        NotACheckpointError: there is no such repository, or it cannot be reached and is not whole in the cache.
    """
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, RepositoryNotFoundError

    hub, cached = HfApi(), False
    advice = "give a directory that exists, or the id of a repository that can be reached"
    with foreign_errors(f"{what} {name!r}", advice, NotACheckpointError):
        try:
            names = hub.list_repo_files(name)
        except (HFValidationError, RepositoryNotFoundError):
            raise
        except Exception:  # noqa: BLE001 - offline, or an outage: whatever the HTTP client raises
            cached = True
            try:
                names = [entry.path for entry in get_cached_repo_tree(name)]
            except CachedRepoTreeNotFoundError:  # what was fetched by earlier versions, or file by file
                return Path(hub.snapshot_download(name, local_files_only=True)), ()
        modules: tuple[str, ...] = ()
        if MODULES_NAME in names:
            modules = module_directories(Path(hub.hf_hub_download(name, MODULES_NAME, local_files_only=cached)))
        carried = choose(names, modules, name)
        wanted = [glob.escape(each) for each in (CONFIG_NAME, *carried.names)]
        return Path(hub.snapshot_download(name, allow_patterns=wanted, local_files_only=cached)), carried.rules

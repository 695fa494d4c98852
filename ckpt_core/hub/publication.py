"""Publishing an export: staged as a candidate, compared by digest, promoted to `main` in one commit, then tagged.

The tag comes last, so a tag means that the target was seen to hold the right bytes; the candidate goes after it, so one
that is there means that its publication did not end. A rerun after a stop at any moment finds what is done, does the
rest, and ends with the same release. All this is written once, for every kind of target.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike

from ckpt_core.errors import HubConflictError
from ckpt_core.hub.card_facts import export_card
from ckpt_core.hub.contents import Content, check_all, check_weights, name_of, read_contents
from ckpt_core.hub.releases import Release, check_tag, describe, next_version, tag_of
from ckpt_core.hub.target import Progress, State, Target, Tree, open_target
from ckpt_core.hub.verification import advance, differs, holds_model, other_bytes, read_back_all
from ckpt_core.urls import local_path


@dataclass(frozen=True)
class Candidate:
    """An export that is at its target, whole and compared by digest, and that is not served yet.

    `name` stands for its content, `commit` for its tree at the target, and `parent` for the commit of `main` that was
    there when it was staged. Where `main` served that content already, `commit` is that one.
    """

    where: str
    name: str
    commit: str
    parent: str | None


def publish(
    export: str | PathLike[str],
    where: str | PathLike[str],
    *,
    tag: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    card: str | None = None,
    pictures: Mapping[str, bytes] | None = None,
    parent: str | None = None,
    progress: Progress | None = None,
    read_back: bool = False,
) -> Release:
    """Make `main` of a target hold exactly this export, and tag it: `stage`, then `promote`.

    Every file of a new release is read and its sha256 compared before the tag is set, also one that the target has.

    Publishing what is published already sends and reads nothing, and returns the release that there is. An unchanged
    release needs an unchanged card: leave times and the tag out of it. Arguments and errors are those of the two.
    """
    candidate = stage(
        export,
        where,
        tag=tag,
        private=private,
        endpoint=endpoint,
        token=token,
        card=card,
        pictures=pictures,
        parent=parent,
        progress=progress,
        read_back=read_back,
    )
    return promote(where, candidate, tag=tag, endpoint=endpoint, token=token)


def stage(
    export: str | PathLike[str],
    where: str | PathLike[str],
    *,
    tag: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    card: str | None = None,
    pictures: Mapping[str, bytes] | None = None,
    parent: str | None = None,
    progress: Progress | None = None,
    read_back: bool = False,
) -> Candidate:
    """Send an export to a target as a candidate, and compare what arrived, by digest; `main` stays as it is.

    Args:
        export: a directory with `export.json`.
        where: `namespace/name` on the Hub, or the path or URL of a directory or bucket; made where there is none.
        tag: the tag that `promote` will set; one that is taken by another release is refused before anything is sent.
        private: make a repository that is missing on the Hub as a private one.
        endpoint: the Hub's address; default: `HF_ENDPOINT`, or huggingface.co.
        token: default: `HF_TOKEN`, or a stored login.
        card: the text of README.md (see `render_card`); default: a minimal one.
        pictures: files to lie beside the card, by name.
        parent: the commit that `main` must be at: the one that a decision was made against, empty where it served no
            model; default: whichever it is.
        progress: told of the bytes that were sent.
        read_back: read every byte from the target too, and compare its sha256.

    Raises:
        ArgumentError: a wrong argument.
        DamagedError: the export is not what `export.json` says, by the sha256 of any file, or was converted without
            digests.
        NotACheckpointError: it has no weights.
        HubAuthError: the token is missing, wrong, or may not write.
        HubConflictError: `main` is not at `parent`, the tag is taken, or the repository is public.
        HubContentError: the target holds other bytes than were sent.
        HubError: all else that keeps the candidate from being there.
    """
    if tag is not None:
        check_tag(tag)
    target = open_target(where, endpoint=endpoint, token=token, private=private, write=True)
    contents = read_contents(export, card if card is not None else partial(export_card, str(where)), pictures)
    state = target.prepare()
    name = name_of({path: (each.size, each.sha256) for path, each in contents.items()})
    if tag is not None and tag in state.tags:
        _check_same(target, tag, state.tags[tag], contents)
    commit = state.head
    if commit is None or differs(target.tree(commit), contents):
        _check_parent(target, state.head, parent)
        check_weights(local_path(export, "export"))
        commit = target.stage(name, contents, state.head, progress)
        if wrong := differs(target.tree(commit), contents):
            raise other_bytes(target, commit, wrong)
    elif name in state.candidates or (tag is not None and tag not in state.tags):  # there will be a new tag
        check_all(contents.values())
    if read_back:
        read_back_all(target, commit, contents)
    return Candidate(str(where), name, commit, parent or state.head)


def promote(
    where: str | PathLike[str],
    candidate: Candidate,
    *,
    tag: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Release:
    """Make `main` serve a candidate, by one new commit, and tag that; the candidate itself is then taken away.

    `tag` defaults to the next of `v1`, `v2`, ... Where `main` serves the same content already, nothing is committed. In
    a directory or bucket the files are read first, since the candidate may have waited there for days.

    Raises:
        HubConflictError: somebody else moved `main` since the candidate was staged, or took the tag.
        HubContentError: a file of the candidate is damaged by now, or `main` holds another tree.
        HubAuthError, HubError: as for `stage`.
    """
    if tag is not None:
        check_tag(tag)
    target = open_target(where, endpoint=endpoint, token=token, write=True)
    state = target.read()
    wanted = target.tree(candidate.commit)
    served = state.head == candidate.commit or (state.head is not None and target.tree(state.head) == wanted)
    name = tag or _tag_for(target, state, candidate, wanted, served=served)
    if name in state.tags and target.tree(state.tags[name]) != wanted:
        raise _taken(target, name, state.tags[name])
    commit, replaced = (state.head, ()) if served else (None, _unreleased(target, state, wanted))
    if not served or name not in state.tags:
        target.check(candidate.commit)
    if commit is None:
        commit = advance(target, candidate.commit, candidate.parent, f"Publish {name}", wanted)
    if name not in state.tags:
        target.tag(name, commit)
    if candidate.name in state.candidates:
        target.discard(candidate.name)
    created = not served or name not in state.tags
    return replace(describe(target, name, commit, wanted, created=created), replaced=replaced)


def discard(
    where: str | PathLike[str], candidate: Candidate, *, endpoint: str | None = None, token: str | None = None
) -> None:
    """Take away a candidate that is not to be served; what `main` or a tag holds stays. Raises as `promote` does."""
    open_target(where, endpoint=endpoint, token=token, write=True).discard(candidate.name)


def _tag_for(target: Target, state: State, candidate: Candidate, wanted: Tree, *, served: bool) -> str:
    """Choose the tag: that of what is served where its publication is complete, else the next version."""
    if not served or state.head is None:
        return next_version(state.tags)
    unfinished = candidate.name in state.candidates
    same = {tag: commit for tag, commit in state.tags.items() if commit == state.head or not unfinished}
    return tag_of(target, same, state.head, wanted) or next_version(state.tags)


def _unreleased(target: Target, state: State, wanted: Tree) -> tuple[str, ...]:
    """Return the files that `main` had, that no release has, and that are other ones or gone now."""
    released = set(state.tags.values())
    if state.head is None or state.head in released:
        return ()
    kept = [wanted, *map(target.tree, released)]
    before = target.tree(state.head)
    return tuple(path for path in sorted(before) if all(tree.get(path) != before[path] for tree in kept))


def _check_parent(target: Target, head: str | None, parent: str | None) -> None:
    if parent is None or head == parent or (not parent and (head is None or not holds_model(target.tree(head)))):
        return
    raise HubConflictError(
        f"{target.where}: main is at {head}, and the decision to publish was made against {parent or 'no model'}; "
        "nothing was sent. Compare with what main serves now, then publish again"
    )


def _check_same(target: Target, tag: str, commit: str, contents: Mapping[str, Content]) -> None:
    if differs(target.tree(commit), contents):
        raise _taken(target, tag, commit)


def _taken(target: Target, tag: str, commit: str) -> HubConflictError:
    return HubConflictError(
        f"{target.where}: the tag {tag} is on commit {commit}, and a release never changes; publish under another tag,"
        " or leave the tag out for the next version"
    )

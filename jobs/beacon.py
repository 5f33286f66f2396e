"""Whether a node sees the run folder and the input as the driver does.

Nodes that do not share the folder would each commit into one of their own. A word that only this
run knows, in a file of the folder, tells.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import InputError, ResourceError
from pipeline.folder import RunFolder
from pipeline.publish import output_errors

PATIENCE = 90.0
"""Seconds for the file to appear on a node: network file systems look for new names seldom."""


def light(folder: RunFolder) -> str:
    """Leaves a word in the run folder, for `check` on every node.

    Raises:
        OutputError: the operating system refuses.
    """
    word = secrets.token_hex(16)
    with output_errors(folder.root):
        folder.beacon.write_text(word, encoding="ascii")
    return word


def check(folder: RunFolder, word: str, inputs: Sequence[str]) -> None:
    """Refuses a node that does not see the word, or not these files.

    Args:
        inputs: paths; the first and the last are looked at.

    Raises:
        ResourceError: it has another folder there, or none.
        InputError: it lacks an input file.
    """
    node, deadline = socket.gethostname(), time.monotonic() + PATIENCE
    while (found := _read(folder.beacon)) != word:
        if time.monotonic() > deadline:
            what = "has another folder" if found else "sees no such run folder"
            raise ResourceError(
                f"node {node} {what} at '{folder.root}': output.path must lie on a file system "
                "that all nodes of the cluster have at the same place"
            )
        time.sleep(1.0)
    for path in {*inputs[:1], *inputs[-1:]}:
        if not os.path.exists(path):
            raise InputError(
                f"node {node} has no '{path}': the input must lie on a file system that all nodes "
                "of the cluster have at the same place"
            )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""

"""Print what this Python lacks of the project's requirements, separated by commas.

    python missing_requirements.py PYPROJECT_TOML [EXTRA]

Looks at the installed versions only and imports none of the packages, so it takes no time.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main(pyproject: str, *extras: str) -> None:
    project = tomllib.loads(Path(pyproject).read_text("utf-8"))["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    print(", ".join(absent(requirements) or unfit(requirements)))


def absent(requirements: list[str]) -> list[str]:
    return [text for text in requirements if installed(re.split(r"[^\w.-]", text)[0]) is None]


def unfit(requirements: list[str]) -> list[str]:
    # transformers brings it: it is there when nothing is absent.
    from packaging.requirements import Requirement

    found = {text: installed(Requirement(text).name) or "" for text in requirements}
    return [
        f"{text} (it has {found[text]})"
        for text in requirements
        if not Requirement(text).specifier.contains(found[text], prereleases=True)
    ]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Which wheels of a folder this Python lacks: their paths on stdout, a line each; what nobody has on stderr.

    python launch/airgapped_missing.py FOLDER NAME ...

Walks from the named packages over the requirements of the wheels it takes. What the host has in a version
that meets them stays as it is, so nothing of its torch, transformers or CUDA is hidden. What neither host nor
folder has is named with who wants it: the parts that need it will not work, the others do. The newest
of several is taken. Not covered: two requirements on one package that no single version meets.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename


def requirements_of(wheel: Path) -> list[Requirement]:
    """What a wheel wants here, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        lines = HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    wanted = [Requirement(line) for line in lines]
    return [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def host_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(folder: Path, names: list[str]) -> tuple[list[Path], list[str]]:
    """The wheels to install, and a sentence for each requirement that neither host nor folder meets."""
    newest = sorted(folder.glob("*.whl"), key=lambda path: parse_wheel_filename(path.name)[1])
    wheels = {parse_wheel_filename(path.name)[0]: path for path in newest}
    taken: dict[str, Path] = {}
    problems = []
    todo = [(Requirement(name), "you") for name in names]
    while todo:
        wanted, by = todo.pop()
        name = canonicalize_name(wanted.name)
        here = host_version(name)
        if name in taken or (here is not None and wanted.specifier.contains(here, prereleases=True)):
            continue
        if name in wheels and wanted.specifier.contains(parse_wheel_filename(wheels[name].name)[1], True):
            taken[name] = wheels[name]
            todo += [(requirement, name) for requirement in requirements_of(wheels[name])]
        else:
            problems.append(f"{wanted} (for {by}): host has {here or 'none'}, the folder none that fits")
    return sorted(taken.values()), sorted(problems)


def main() -> None:
    paths, problems = missing(Path(sys.argv[1]), sys.argv[2:])
    print(*paths, sep="\n")
    for problem in problems:
        print(f"not here: {problem}", file=sys.stderr)


if __name__ == "__main__":
    main()

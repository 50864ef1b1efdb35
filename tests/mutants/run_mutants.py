"""Puts every fault of `mutants.py` into a copy of the tree, one at a time, and says which ones no test sees.

    make mutants                        all that have not died yet in this very tree
    make mutants ONLY="schedule tile"   those with one of these words in their name, whatever is known of them

A fault dies when every test that it names fails. The working tree is never touched: the copy lies in a
temporary folder, and the tests run there, each time in a process forked from this one, which has imported
the libraries that take long (and nothing of ours). Before the first fault the named tests must pass. Results
go to build/mutants.json after every fault, so a run that was stopped goes on where it was.

Leaves with 1 when a fault lives without a reason in the table, when one that is said to be harmless dies,
when its text is not found exactly once, or when the named tests could not run.

What is not covered: faults that only a GPU or several hosts would show.
"""

from __future__ import annotations

import compileall
import gc
import hashlib
import json
import os
import py_compile
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mutants import FILES, MUTANTS, Mutant

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "build" / "mutants.json"
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", "__pycache__", "build", "dist", "runs", "*.egg-info"
)
TIMEOUT_S = 300
SEEN = ("timeout", "segmentation fault")
"""Ends of the tests' process with which a fault has been seen, too."""


class Outcomes:
    """A pytest plugin: how every test ended, by node id."""

    def __init__(self) -> None:
        self.by_test: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            worst = {report.outcome, self.by_test.get(report.nodeid, "passed")}
            self.by_test[report.nodeid] = next(o for o in ("failed", "skipped", "passed") if o in worst)


def import_libraries() -> None:
    """What most tests import; never anything of ours, which must come from the copy."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import deepspeed  # noqa: F401
    import hypothesis  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    assert not [name for name in sys.modules if name.startswith("versatune")]
    gc.freeze()


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """A copy that Python compiles by content: a file changed twice within a second is seen to change."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        tree = Path(parent) / "tree"
        shutil.copytree(REPOSITORY, tree, ignore=LEFT_OUT, symlinks=True)
        for package in ("versatune_ds", "kernels"):
            mode = py_compile.PycInvalidationMode.CHECKED_HASH
            compileall.compile_dir(tree / package, quiet=1, invalidation_mode=mode)
        yield tree


def run_tests(tree: Path, tests: Sequence[str], timeout_s: float) -> dict[str, str] | str:
    """Run tests in a forked process: their outcomes by node id, or why there are none."""
    report, log = tree.parent / "outcomes.json", tree.parent / "log.txt"
    report.unlink(missing_ok=True)
    temporary = tree.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(tree)
            ours = [str(tree), str(tree / "kernels")]
            sys.path[:0] = ours
            sys.dont_write_bytecode = True
            os.environ |= {"PYTHONPATH": os.pathsep.join(ours), "PYTHONDONTWRITEBYTECODE": "1"}
            os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
            outcomes = Outcomes()
            code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", *tests], plugins=[outcomes])
            import versatune_kernels

            assert Path(versatune_kernels.__file__).is_relative_to(tree)
            report.write_text(json.dumps(outcomes.by_test if code in (0, 1) else f"pytest left with {code}"))
            sys.stdout.flush()
        finally:
            os._exit(0)
    deadline = time.monotonic() + timeout_s
    ended = (0, 0)
    try:
        while ended[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
            ended = os.waitpid(child, os.WNOHANG)
    finally:
        if ended[0] == 0:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if ended[0] == 0:
        return "timeout"
    if os.waitstatus_to_exitcode(ended[1]) == -signal.SIGSEGV:
        return "segmentation fault"
    if not report.exists():
        return "the tests' process died"
    found: dict[str, str] | str = json.loads(report.read_text())
    return found


def tail_of_log(tree: Path) -> str:
    return "\n".join((tree.parent / "log.txt").read_text(errors="replace").splitlines()[-60:])


def unseen(outcomes: dict[str, str], tests: Sequence[str]) -> list[str]:
    """The named tests of which nothing failed."""
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    return [t for t in tests if not any(f == t or f.startswith((f"{t}[", f"{t}::")) for f in failed)]


def try_mutant(tree: Path, mutant: Mutant) -> str:
    """`died`, `lives: ...`, or `error: ...`."""
    path = tree / FILES[mutant.file]
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.find) != 1:
        return f"error: its text stands {source.count(mutant.find)} times in {FILES[mutant.file]}"
    try:
        path.write_text(source.replace(mutant.find, mutant.put), encoding="utf-8")
        outcomes = run_tests(tree, mutant.tests, TIMEOUT_S)
    finally:
        path.write_text(source, encoding="utf-8")
    if outcomes in SEEN:
        return "died"
    if isinstance(outcomes, str):
        return f"error: {outcomes}\n{tail_of_log(tree)}"
    living = unseen(outcomes, mutant.tests)
    if mutant.harmless:
        return "lives" if living == list(mutant.tests) else "error: said to be harmless, and a test failed"
    return f"lives: not seen by {', '.join(living)}" if living else "died"


def digest_of_tree(tree: Path) -> str:
    """Changes with any file that a test may look at, the table of faults apart."""
    digest = hashlib.sha256()
    for path in sorted(tree.rglob("*")):
        if path.suffix != ".pyc" and path.is_file() and path.parent.name != "mutants":
            digest.update(f"{path.relative_to(tree)} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def main(words: Sequence[str]) -> int:
    """Try the faults; the exit code of the command."""
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if unknown := [word for word in words if not any(word in m.name for m in MUTANTS)]:
        print(f"no fault has this in its name: {', '.join(unknown)}")
        return 1
    import_libraries()
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with copy_of_the_tree() as tree:
        digest = digest_of_tree(tree)
        if not words:
            done = [m.name for m in chosen if known.get(m.name) == [m.digest(digest), "died"]]
            chosen = [m for m in chosen if m.name not in done]
            print(f"{len(done)} of {len(MUTANTS)} faults have died in this tree before", flush=True)
        tests = sorted({test for m in chosen for test in m.tests})
        outcomes = run_tests(tree, tests, 10 * TIMEOUT_S) if tests else {}
        if isinstance(outcomes, str) or "failed" in outcomes.values():
            print(f"the tests do not pass without a fault:\n{tail_of_log(tree)}")
            return 1
        problems = []
        for i, mutant in enumerate(chosen, start=1):
            began = time.monotonic()
            result = try_mutant(tree, mutant)
            print(f"{i}/{len(chosen)} {time.monotonic() - began:.1f} s: {mutant.name}: {result}", flush=True)
            known[mutant.name] = [mutant.digest(digest), result]
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(known, indent=1))
            if result not in ("died", "lives"):
                problems.append(f"{mutant.name}: {result.splitlines()[0]}")
    harmless = [f"{m.name} ({m.harmless})" for m in chosen if m.harmless]
    print(f"{len(chosen)} tried, {len(chosen) - len(problems) - len(harmless)} died", end="")
    print(f"; harmless, for the reason given: {'; '.join(harmless)}" if harmless else "")
    print("".join(f"PROBLEM {line}\n" for line in problems), end="")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

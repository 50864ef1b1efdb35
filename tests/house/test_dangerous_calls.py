"""No shell is built from data, and nothing is unpickled or evaluated, but for the places named here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from launching import REPOSITORY

FILES = sorted(
    path for folder in ("versatune_ds", "kernels", "launch") for path in (REPOSITORY / folder).rglob("*.py")
)
FORBIDDEN = {
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
    "pickle.load": "runs code of a file",
    "pickle.loads": "runs code of a file",
    "joblib.load": "runs code of a file",
    "torch.load": "runs code of a file unless weights_only=True",
    "yaml.load": "builds any object",
    "yaml.unsafe_load": "builds any object",
    "numpy.load": "may unpickle",
    "np.load": "may unpickle",
    "eval": "runs text as code",
    "exec": "runs text as code",
}
ALLOWED = {
    # A worker of `prepare` reads the settings that its own parent wrote a moment ago, mode 0600.
    ("versatune_ds/data/encode/workers.py", "pickle.load"),
}


def findings(path: Path, text: str) -> list[str]:
    """Dangerous calls of a file."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if arguments.get("shell", "False") != "False":
            found.append(f"{path}:{node.lineno}: shell={arguments['shell']}")
        is_model = name.startswith("AutoModel") and name.endswith(".from_pretrained")
        if is_model and arguments.get("use_safetensors") != "True":
            found.append(f"{path}:{node.lineno}: {name} without use_safetensors=True may unpickle")
        is_safe = (name == "torch.load" and arguments.get("weights_only") == "True") or (
            name in ("np.load", "numpy.load") and arguments.get("allow_pickle") == "False"
        )
        if name in FORBIDDEN and not is_safe and (str(path), name) not in ALLOWED:
            found.append(f"{path}:{node.lineno}: {name} {FORBIDDEN[name]}")
    return found


def test_no_file_makes_a_dangerous_call():
    assert FILES
    found = [
        line
        for path in FILES
        for line in findings(path.relative_to(REPOSITORY), path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "os.system(f'rm {name}')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "np.load(path, allow_pickle=True)",
        "AutoModelForCausalLM.from_pretrained(name)",
        "eval(text)",
    ],
)
def test_the_rule_sees(code):
    assert findings(Path("x.py"), code)


@pytest.mark.parametrize(
    "code", ["subprocess.run([a, b])", "torch.load(p, weights_only=True)", "model.eval()", "json.loads(x)"]
)
def test_the_rule_lets_pass(code):
    assert not findings(Path("x.py"), code)


def test_every_exception_is_still_needed():
    for path, name in ALLOWED:
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        assert f"{name}(" in text, path

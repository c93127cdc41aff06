"""The house as `docs/architecture.md` draws it: imports flow one way, and each power lies in one place."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "secateur"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
MODELING = "model/modeling_secateur.py"

# From the bottom up. A file may import from lower layers and from its own folder.
LAYERS: tuple[set[str], ...] = (
    {"errors", "version", "signatures"},
    {"run", "folders", "hf", "quantities"},
    {"sharing"},
    {"journal"},
    {"engines"},
    {"assets"},
    {"record"},
    {"model"},
    {"auto"},
    {"surgery"},
    {"engine"},
    {"workers"},
    {"solvers"},
    {"methods"},
    {"account"},
    {"export"},
    {"card"},
    {"judge", "output"},
    {"goals"},
    {"driver"},
    {"compensation", "serving", "disk_room"},
    {"planning"},
    {"pruning"},
    {"running"},
    {"forecast"},
    {"fitting"},
    {"testing"},
    {"doctor"},
    {"heal"},
    {"report"},
    {"grid"},
    {"secateur"},  # the package's own names, for users and the commands
    {"cli"},
)
LAYER = {part: level for level, parts in enumerate(LAYERS) for part in parts}

Check = Callable[[str], Iterator[str]]  # a file's violations


@functools.cache
def parsed(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def nodes(file: str) -> tuple[ast.AST, ...]:
    return parsed(SOURCE / file)


def part_of(file: str) -> str:
    """The folder or module directly under the package."""
    part = file.partition("/")[0].removesuffix(".py")
    return "secateur" if part == "__init__" else part


def imported(file: str) -> Iterator[str]:
    """All that a file imports, as dotted names."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module}.{alias.name}" for alias in node.names)


def calls(file: str) -> Iterator[tuple[str, ast.Call]]:
    """Calls by the dotted name of what is called."""
    for node in nodes(file):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# --- rules for single files ---


def upward_imports(file: str) -> Iterator[str]:
    here = part_of(file)
    for name in imported(file):
        root, _, rest = name.partition(".")
        there = rest.partition(".")[0] if rest.partition(".")[0] in LAYER else "secateur"
        if root == "" or (root == "secateur" and there != here and LAYER[there] >= LAYER[here]):
            yield f"{file} imports {name}"


def imports_of_other_methods(file: str) -> Iterator[str]:
    if file.startswith("methods/") and not file.endswith("__init__.py"):
        allowed = () if file.endswith("registry.py") else ("secateur.methods.registry",)
        for name in imported(file):
            if name.startswith("secateur.methods") and not name.startswith(allowed):
                yield f"{file} imports {name}"


def output_and_exits(file: str) -> Iterator[str]:
    if part_of(file) == "cli":
        return
    forbidden = {"print", "input", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write"}
    yield from (f"{file}:{call.lineno} calls {name}" for name, call in calls(file) if name in forbidden)
    for node in nodes(file):
        if isinstance(node, ast.Raise) and node.exc and ast.unparse(node.exc).startswith("SystemExit"):
            yield f"{file}:{node.lineno} exits"
    shows = {"rich", "typer", "click", "tqdm"}
    yield from (f"{file} imports {name}" for name in imported(file) if name.partition(".")[0] in shows)


def cases_by_family(file: str) -> Iterator[str]:
    """No code asks which family it has before it: what differs stands in the table."""
    for node in nodes(file):
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
            asks = any(ast.unparse(each).endswith("model_type") for each in compared)
            constants = [part for each in compared for part in ast.walk(each) if isinstance(part, ast.Constant)]
            if asks and any(isinstance(each.value, str) for each in constants):
                yield f"{file}:{node.lineno}"
        elif isinstance(node, ast.Match) and ast.unparse(node.subject).endswith("model_type"):
            yield f"{file}:{node.lineno}"


def shared_randomness(file: str) -> Iterator[str]:
    """`run.rng` gives generators; nothing draws from, or seeds, what the whole process shares.

    But for one file, which gives it back as it was.
    """
    if file == "hf.py":
        return
    drawing = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal"}
    for name, call in calls(file):
        module, _, function = name.rpartition(".")
        has_generator = any(keyword.arg == "generator" for keyword in call.keywords)
        if (module == "torch" and function in drawing and not has_generator) or name == "torch.manual_seed":
            yield f"{file}:{call.lineno} calls {name}"
    yield from (f"{file} imports {name}" for name in imported(file) if name.split(".")[0] == "random")


def crowds_of_parameters(file: str) -> Iterator[str]:
    """More than ten belong in a type of their own; but a command's flags and a method's options are its signature."""
    for node in nodes(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and part_of(file) != "cli":
            options = any(ast.unparse(each).startswith("method(") for each in node.decorator_list)
            every = [*node.args.posonlyargs, *node.args.args, *([] if options else node.args.kwonlyargs)]
            if len([each for each in every if each.arg not in ("self", "cls")]) > 10:
                yield f"{file}:{node.lineno} {node.name}"


def ignores_without_a_reason(file: str) -> Iterator[str]:
    for number, line in enumerate((SOURCE / file).read_text(encoding="utf-8").splitlines(), start=1):
        _, found, rest = line.partition("# type: " + "ignore")
        if found and not re.sub(r"^\[[\w, -]+\]|# *(noqa|fmt|pragma)\S*.*?(?=#|$)|[\s#]", "", rest):
            yield f"{file}:{number}"


def silence(file: str) -> Iterator[str]:
    module = nodes(file)[0]
    assert isinstance(module, ast.Module)
    if not ast.get_docstring(module):
        yield f"{file} does not say what it is for"


BROKEN: dict[Check, list[tuple[str, str]]] = {
    upward_imports: [
        ("engine/x.py", "from secateur.methods.two_ssp import plan"),
        ("engine/x.py", "import secateur.pruning"),
        ("engine/x.py", "from .walk import walk"),
        ("run.py", "import secateur"),
        ("run.py", "from secateur.hf import quiet_transformers"),
        ("model/x.py", "def f():\n    from secateur import pruning"),
        ("pruning.py", "from secateur.cli import main"),
    ],
    imports_of_other_methods: [
        ("methods/x.py", "from secateur.methods.two_ssp import plan"),
        ("methods/x.py", "from secateur.methods import two_ssp"),
        ("methods/registry.py", "from secateur.methods import two_ssp"),
    ],
    output_and_exits: [
        (f"engine/{n}.py", code) for n, code in enumerate(["print(1)", "sys.exit()", "import rich.table"])
    ],
    cases_by_family: [
        ("model/x.py", "x = config.model_type == 'opt'"),
        ("model/y.py", "x = model_type in ('a', 'b')"),
        ("model/z.py", "match model_type:\n    case _: pass"),
    ],
    shared_randomness: [("run.py", "torch.randn(3)"), ("run.py", "torch.manual_seed(0)"), ("run.py", "import random")],
    crowds_of_parameters: [("run.py", f"def f({', '.join('abcdefgh')}, *, i, j, k): pass")],
    ignores_without_a_reason: [
        ("run.py", "x = 1  # type: " + "ignore[assignment]"),
        ("card.py", "x = 1  # type: " + "ignore[a, b]  # noqa: F821"),
    ],
    silence: [("run.py", "x = 1")],
}


@pytest.mark.parametrize("check", BROKEN)
def test_no_file_breaks_the_rule(check: Check) -> None:
    assert [violation for file in FILES for violation in check(file)] == []


@pytest.mark.parametrize("check", BROKEN)
def test_the_rule_sees_what_it_forbids(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (file, code) in enumerate(BROKEN[check]):
        root = tmp_path / str(number)
        (root / file).parent.mkdir(parents=True)
        (root / file).write_text(code)
        monkeypatch.setitem(globals(), "SOURCE", root)
        assert list(check(file)), code


# --- rules for the whole ---


def test_every_file_has_a_layer() -> None:
    assert {part_of(file) for file in FILES} == set(LAYER)


def test_the_modeling_file_stands_alone() -> None:
    roots = {name.partition(".")[0] for name in imported(MODELING)}
    assert roots <= {"torch", "transformers", *sys.stdlib_module_names}


def test_only_surgery_changes_a_model() -> None:
    """The primitives that shrink are called by `apply`."""
    primitives = {
        "keep_neurons": {MODELING, "surgery/apply.py"},
        "keep_heads": {MODELING, "surgery/apply.py"},
        "drop_attention": {MODELING, "surgery/apply.py"},
        "drop_mlp": {MODELING, "surgery/apply.py"},
        "narrow": {MODELING},
        "forget_block": {"surgery/apply.py"},
        "state_config": {"surgery/apply.py"},
        "apply": {"driver.py", "testing.py", "doctor/oracles.py", "workers/sweeps.py"},
    }
    users: dict[str, set[str]] = {name: set() for name in primitives}
    for file in FILES:
        for name, _ in calls(file):
            function = name.rpartition(".")[2]
            if function in users:
                users[function].add(file)
    assert users == primitives

"""The laws of the house: who may import whom, what files are called, what each of them owes."""

import ast
import itertools
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dtrain"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

MAY_IMPORT = {
    "model": ("dtrain.batch", "dtrain.kernels", "dtrain.model"),
    "kernels": ("dtrain.batch", "dtrain.kernels"),
    "data": ("dtrain.batch", "dtrain.errors", "dtrain.data"),
}
"""What of dtrain each folder may know."""

WITHOUT_TEST_FILE = {
    "dtrain/commands/average.py": "test_commands.py runs all commands",
    "dtrain/commands/evaluate.py": "test_commands.py runs all commands",
    "dtrain/commands/prepare.py": "test_commands.py runs all commands",
    "dtrain/commands/status.py": "test_commands.py runs all commands",
    "dtrain/commands/translate.py": "test_commands.py runs all commands",
    "dtrain/data/preparation.py": "test_store.py reads what it writes",
    "dtrain/data/settings.py": "test_config.py reads and refuses all settings",
    "dtrain/kernels/fused_residual.py": "test_residual.py compares it with its plain twin",
    "dtrain/model/settings.py": "test_config.py reads and refuses all settings",
}
"""Files that need no tests/test_<file>.py, and why."""

SLOW_TO_IMPORT = {"datasets", "matplotlib", "numpy", "sacrebleu", "sentencepiece", "torch", "wandb"}
"""Packages that `dtrain --help` must not wait for."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names: [] for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.module, "imports are absolute"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in FILES else node.module for name in names]
    return []


def imports(module: str) -> set[str]:
    """All modules that a module imports, inside functions and for type checking too.

    Not those of `if __name__ == "__main__"`, which no importer reaches.
    """
    statements = [
        node
        for node in TREES[module].body
        if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
    ]
    nodes = itertools.chain.from_iterable(map(ast.walk, statements))
    return set(itertools.chain.from_iterable(map(imported, nodes)))


def run_at_import(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that importing a module runs, but for the bodies of its classes."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from run_at_import(getattr(node, field, []))


def loads(module: str, seen: set[str] | None = None) -> set[str]:
    """The top-level packages that importing a module of dtrain loads, by whatever way."""
    seen = set() if seen is None else seen
    packages = set()
    parents = [module.rsplit(".", n)[0] for n in range(module.count(".") + 1)]
    for name in [name for name in parents if name in FILES and name not in seen]:
        seen.add(name)
        for node in run_at_import(TREES[name].body):
            for target in imported(node):
                packages |= loads(target, seen) if target in FILES else {target.split(".")[0]}
    return packages


def places(found: list[tuple[str, ast.expr | ast.stmt]]) -> list[str]:
    return [f"{FILES[module].relative_to(ROOT)}:{node.lineno}" for module, node in found]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_know_only_their_neighbours(folder):
    strangers = [
        f"{module} imports {target}"
        for module in TREES
        if f"{module}.".startswith(f"dtrain.{folder}.")
        for target in imports(module)
        if target.split(".")[0] == "dtrain"
        and not any(f"{target}.".startswith(f"{name}.") for name in MAY_IMPORT[folder])
    ]
    assert not strangers


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: imports(module) & FILES.keys() for module in TREES}
    TopologicalSorter(graph).prepare()  # or CycleError, which names the cycle


def test_only_distributed_speaks_to_other_ranks():
    speaks = re.compile(r"torch\.(distributed|nn\.parallel)\b")
    found = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            names = imported(node)
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                names = [f"torch.{alias.name}" for alias in node.names]
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            if any(map(speaks.match, names)):
                found.append((module, node))
    assert {module for module, _ in found} <= {"dtrain.distributed"}, places(found)


def test_files_are_called_after_what_they_hold():
    banned = {"utils", "util", "common", "helpers", "helper", "base", "misc", "manager"}
    paths = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    assert not [path for path in paths if banned & {path.stem, path.parent.name}]


def test_only_commands_and_metrics_print():
    found = [
        (module, node)
        for module, tree in TREES.items()
        if not module.startswith("dtrain.commands.")
        and module not in ("dtrain.metrics", "dtrain.__main__")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert not found, places(found)


def test_nothing_is_pickled():
    packages = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
    found = [
        (module, node)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if packages & {name.split(".")[0] for name in imported(node)}
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"))
        or (isinstance(node, ast.Call) and "allow_pickle" in [word.arg for word in node.keywords])
    ]
    assert not found, places(found)


def test_every_file_has_its_tests():
    paths = {str(path.relative_to(ROOT)) for path in FILES.values() if path.name != "__init__.py"}
    untested = {
        path
        for path in paths
        if not (ROOT / "tests" / f"test_{Path(path).stem.strip('_')}.py").exists()
    }
    assert untested == WITHOUT_TEST_FILE.keys()


def test_everything_public_has_a_docstring():
    def public(nodes: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    yield from public(node.body)

    found = [
        (module, node)
        for module, tree in TREES.items()
        for node in public(tree.body)
        if not ast.get_docstring(node)
    ]
    assert not found, places(found)
    assert all(map(ast.get_docstring, TREES.values()))


@pytest.mark.parametrize(
    "module", [name for name in FILES if re.match(r"dtrain\.(commands|__main__|config)\b", name)]
)
def test_help_waits_for_nothing_slow(module):
    assert not loads(module) & SLOW_TO_IMPORT


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    from dtrain.config import load_config

    assert load_config(path).run.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_says_what_to_expect(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    opening = itertools.takewhile(lambda line: line.startswith("#"), lines)
    subjects = {line.split()[1] for line in opening if len(line.split()) > 1}
    assert {"Source", "Expected", "Hardware", "Disk"} <= subjects

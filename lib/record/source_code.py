"""A hash of the code behind a stage: its notebook and every module of ``lib/`` that it imports, directly or not."""

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lib.record.paths import PROJECT_ROOT


def code_hash(stage: str) -> str:
    """SHA-256 over a stage's code cells, but its parameters, and the modules behind them, but those for types."""
    cells = json.loads((PROJECT_ROOT / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join(
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    )
    digest = hashlib.sha256(code.encode())
    for module in modules_behind(code):
        digest.update(_file_of(module).read_bytes())
    return digest.hexdigest()


def modules_behind(code: str) -> list[str]:
    """Dotted names of the modules of ``lib`` that ``code`` imports, and that those import, in order of their names."""
    found: set[str] = set()
    waiting = {"lib", *_imported_modules(code)}
    while waiting:
        module = waiting.pop()
        found.add(module)
        waiting |= _imported_modules(_file_of(module).read_text(encoding="utf-8")) - found
    return sorted(found)


@cache
def _imported_modules(code: str) -> frozenset[str]:
    return frozenset(name for name in _imported_names(ast.parse(code)) if _file_of(name).is_file())


def _imported_names(node: ast.AST) -> Iterator[str]:
    """What may be a module: ``from lib.record import rows`` gives ``lib.record`` and ``lib.record.rows``."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
    if isinstance(node, ast.ImportFrom):
        names = [str(node.module), *(f"{node.module}.{name}" for name in names)]
    yield from (name for name in names if name.partition(".")[0] == "lib")
    for child in ast.iter_child_nodes(node):
        yield from _imported_names(child)


def _file_of(module: str) -> Path:
    path = PROJECT_ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

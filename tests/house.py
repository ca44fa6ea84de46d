"""The rooms of the package and who imports whom, read off the sources.

python tests/house.py     draws the picture in CONTRIBUTING.md anew
"""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "contrastive_kernels"

# The rooms, from the roof down: a module imports from its own room and from rooms below.
ROOMS = [
    "integrations",
    "training",
    "structure",
    "em",
    "losses",
    "search",
    "planning",
    "distributed",
    "operators",
    "engine",
    "arguments",
    "backends",
    "reference",
    "panels",
    "draws",
]
#: Rooms that the house's plan has and that are still to be built.
UNBUILT: set[str] = set()
#: Public names of former places; they and the package itself stand above all rooms.
FORMER_PLACES = {"functional", "reference_structure", "retrieval", "sampling", "specs", "structure_losses"}
TOPS = {"", "__main__"} | FORMER_PLACES
#: Below all rooms; the first two are not Python modules of the package.
GROUND = {"_C", "_triton", "_library"}
OUTSIDE = {"_C", "_triton"}


def package_modules():
    """{dotted name below contrastive_kernels ("" for the package itself): path}, without the Triton kernels."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        if "_triton" in path.relative_to(PACKAGE).parts:
            continue
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = package_modules()


def imported_modules(name, path):
    """Names (as in MODULES, or OUTSIDE) of the package's own modules that a module imports, anywhere in its text."""
    folder = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = folder.split(".") if folder else []
                kept = parents[: len(parents) - (node.level - 1)]
                base = ".".join(["contrastive_kernels", *kept, *([base] if base else [])])
            absolute = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in absolute:
            if full.split(".")[0] != "contrastive_kernels" or full.endswith(".__version__"):
                continue
            inner = full.partition(".")[2]
            while inner and inner not in MODULES and inner not in OUTSIDE:  # `import log_sum`: a name
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found


def room_of(module):
    """The folder that a module lies in."""
    return module.split(".")[0]


def imports_between_rooms():
    """{(room above, room below): modules of the lower one that modules of the upper one import}."""
    found = Counter()
    for name, path in MODULES.items():
        if name in TOPS | GROUND:
            continue
        for target in imported_modules(name, path) - GROUND:
            if room_of(target) != room_of(name):
                found[room_of(name), room_of(target)] += 1
    return found


def picture():
    """The house as a mermaid diagram: rooms with their files, and an arrow for what imports what."""
    lines = ["```mermaid", "flowchart TD"]
    for room in ROOMS:
        files = sorted(name.partition(".")[2] for name in MODULES if name.startswith(room + "."))
        if files:
            lines.append(f'    {room}["<b>{room}/</b><br/>{", ".join(files)}"]')
    order = {room: place for place, room in enumerate(ROOMS)}
    for upper, lower in sorted(imports_between_rooms(), key=lambda pair: (order[pair[0]], order[pair[1]])):
        lines.append(f"    {upper} --> {lower}")
    return "\n".join([*lines, "```"])


if __name__ == "__main__":
    document = ROOT / "CONTRIBUTING.md"
    text = document.read_text()
    document.write_text(re.sub(r"```mermaid\n.*?```", lambda _: picture(), text, flags=re.DOTALL))

"""What CONTRIBUTING.md promises of the sources themselves, read without running them."""

import ast
import inspect
import re
import subprocess
from collections import Counter

import house
import pytest
from house import GROUND, MODULES, PACKAGE, ROOMS, ROOT, TOPS, UNBUILT, imported_modules, room_of

import contrastive_kernels as ck

CODE = {".py", ".cpp", ".cu", ".cuh", ".h", ".sh"}
TEXT = CODE | {".in", ".json", ".jsonl", ".md", ".pyi", ".toml", ".txt", ".yml", ""}
LONGEST_FILE = 450
VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def project_files(suffixes):
    """The project's own files: what git tracks or would track; in an unpacked sdist, everything but build products."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        files = [ROOT / name for name in names]
    else:
        products = {".venv", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
        files = [path for path in ROOT.rglob("*") if not products & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in files if path.suffix in suffixes and path.is_file())


def test_every_module_has_its_room():
    rooms = {room_of(name) for name in set(MODULES) - TOPS - GROUND}
    assert rooms == set(ROOMS) - UNBUILT, "a new room needs its place in ROOMS, and in CONTRIBUTING.md"


def test_the_picture_of_the_house_is_todays():
    assert house.picture() in (ROOT / "CONTRIBUTING.md").read_text(), "python tests/house.py draws it anew"


@pytest.mark.parametrize("name", sorted(set(MODULES) - TOPS))
def test_imports_run_downwards(name):
    for target in imported_modules(name, MODULES[name]):
        assert target not in TOPS, f"{name} imports the package from within"
        if target in GROUND:
            continue
        assert name not in GROUND, f"{name} imports {target}, and stands on the ground"
        assert ROOMS.index(room_of(name)) <= ROOMS.index(room_of(target)), f"{name} imports {target}, which is above it"


def test_every_file_of_the_tests_has_its_own_name():
    """They are imported by name alone: of two of one name, a conftest.py too, only the first is collected."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if "peers" not in path.parts)
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("room", sorted(set(ROOMS) - UNBUILT))
def test_a_room_has_no_circles(room):
    """Within a room imports have an order too."""
    inside = {name: imported_modules(name, MODULES[name]) for name in MODULES if room_of(name) == room}
    above = {name: {t for t in targets if room_of(t) == room and t != name} for name, targets in inside.items()}
    while above:
        free = {name for name, targets in above.items() if not targets & set(above)}
        assert free, f"imports go round in {sorted(above)}"
        above = {name: targets for name, targets in above.items() if name not in free}


def test_the_product_does_not_lean_on_its_definition():
    for name, path in MODULES.items():
        if name not in TOPS and room_of(name) != "reference":
            assert not {t for t in imported_modules(name, path) if room_of(t) == "reference"}, name


def test_triton_kernels_stand_alone():
    """Their folder is a part of the package by a link, and knows nothing of the rest."""
    folder = PACKAGE / "_triton"
    files = sorted(folder.glob("*.py"))
    assert {"score.py", "pair_terms.py", "configs.py", "launch.py"} <= {path.name for path in files}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name} imports from above"
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            assert not [name for name in names if name.startswith("contrastive_kernels")], path.name


def test_import_reader_sees_every_form(tmp_path):
    path = tmp_path / "cpu.py"
    path.write_text(
        "import contrastive_kernels.losses\nfrom contrastive_kernels import _C\nfrom ..engine import driver\n"
        "from ..panels.terms import PairTerm\nfrom .products import score_product\nimport torch\n"
        "def f():\n    from ..functional import clip_loss\n    from .._triton import launch\n"
    )
    expected = {"losses", "_C", "_triton", "engine.driver", "panels.terms", "backends.products", "functional"}
    assert imported_modules("backends.cpu", path) == expected


@pytest.mark.parametrize("name", sorted(MODULES))
def test_package_code(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        line = getattr(node, "lineno", 0)
        if isinstance(
            node, ast.Assert
        ):  # `assert x is not None` tells mypy what a reader can see; any other is a check
            narrows = isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.IsNot)
            assert narrows, f"{name}:{line}: an assert is no answer to a user's mistake"
        is_environment = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        assert not is_environment, f"{name}:{line}: no environment variables at run time"
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            assert node.exc.func.id != "Exception", f"{name}:{line}: raise what it is"


#: Of torch; what they make has the user's default dtype and lies on the default device unless they are told.
FACTORIES = {"arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand"}
FACTORIES |= {"randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}


@pytest.mark.parametrize(
    "path", [*MODULES.values(), *sorted((ROOT / "triton_kernels").glob("*.py"))], ids=lambda path: path.stem
)
def test_allocations_name_dtype_and_device(path):
    """A scratch of bfloat16 where float32 is meant is written beyond its end."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            told = {keyword.arg for keyword in node.keywords}
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            assert not of_torch or None in told or told >= {"dtype", "device"}, f"{path}:{node.lineno}: {told}"


CPP = [path for path in project_files({".cpp", ".h", ".cu", ".cuh"}) if (ROOT / "csrc") in path.parents]


@pytest.mark.parametrize("path", CPP, ids=lambda path: path.name)
def test_cpp_is_torch_free_and_silent(path):
    text = path.read_text()
    includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', text, flags=re.MULTILINE)
    for include in includes:
        top = include.split("/")[0]
        assert top not in {"torch", "ATen", "c10", "Python.h"}, f"{path.name} includes {include}"
        assert top != "pybind11" or path.name == "bindings.cpp", f"only bindings.cpp knows pybind11, not {path.name}"
    assert not re.search(r"\b(printf|fprintf|cout|cerr|abort|exit)\b", text), f"{path.name} prints or exits"


def test_there_is_cpp_to_check():
    assert {"bindings.cpp", "members.h", "exponential.h", "dispatch.cpp"} <= {path.name for path in CPP}


def public_objects():
    names = [name for name in ck.__all__ if not inspect.ismodule(getattr(ck, name)) and not name.startswith("__")]
    objects = {name: getattr(ck, name) for name in names}
    for module in (ck.reference, ck.reference_structure):
        objects |= {f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name) for name in module.__all__}
    return {name: value for name, value in objects.items() if callable(value)}


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_public_docstrings(name):
    value = public_objects()[name]
    doc = inspect.getdoc(value)
    assert doc, f"{name} has no docstring"
    assert doc.splitlines()[0].rstrip().endswith("."), f"{name}: the first line is not one sentence"
    parameters = [p.name for p in inspect.signature(value).parameters.values() if p.kind not in VARIADIC]
    if parameters:
        section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[^\n]*\n-{3,}\n|\Z)", doc, flags=re.MULTILINE | re.DOTALL)
        assert section, f"{name}: no section Parameters"
        heads = re.findall(r"^(?=\S)([\w*, ]+?)(?: :.*)?$", section[1], flags=re.MULTILINE)
        described = set(re.findall(r"\w+", " ".join(heads)))
        assert set(parameters) <= described, f"{name}: not described: {sorted(set(parameters) - described)}"


def test_files_fit_in_the_head():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in project_files(CODE)}
    too_long = {name: length for name, length in lengths.items() if length > LONGEST_FILE}
    assert not too_long


def test_nothing_names_a_machine_or_a_registry():
    machine = re.compile(r"(?<![\w.])/(?:root|home|work|Users)/\w")
    registry = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|npmjs\.|deb\.debian\.")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in project_files(TEXT)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if machine.search(line) or registry.search(line)
    ]
    assert not found, "\n".join(found)


def test_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    module = pytest.importorskip("contrastive_kernels._C", reason="no extension to compare the stub with")
    defined = {name for name in dir(module) if not name.startswith("_")}
    assert declared == defined, "_C.pyi and csrc/bindings.cpp name different things"

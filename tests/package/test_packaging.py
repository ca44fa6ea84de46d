"""What a person meets who installs the package: its metadata, its files, its report, and life without the extension."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import contrastive_kernels as ck
from contrastive_kernels.backends import sources

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments, **environment):
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def extension():
    return pytest.importorskip("contrastive_kernels._C", reason="the extension is not installed")


def test_version_has_one_source():
    assert metadata.version("contrastive-kernels") == ck.__version__
    holders = [
        path.name
        for path in [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "contrastive_kernels").rglob("*.py")]
        if re.search(rf"[\"']{re.escape(ck.__version__)}[\"']", path.read_text())
    ]
    assert holders == ["__init__.py"]


def test_version_is_known_without_importing_torch():
    script = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""
    output = run_python("-c", script, CK_EXTENSION="0")
    assert output.split()[-1] == ck.__version__


def test_setup_imports_neither_torch_nor_the_package():
    tree = ast.parse((ROOT / "setup.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.split(".")[0] in ("torch", "contrastive_kernels")}


def test_torch_is_the_only_requirement():
    needed = [line for line in metadata.requires("contrastive-kernels") if "extra ==" not in line]
    assert [re.split(r"[<>=!~ ]", line)[0] for line in needed] == ["torch"]


def test_constraints_pin_every_requirement():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    # builds of torch with CUDA require one version of triton each, which a pin would contradict
    assert all(re.fullmatch(r"(triton<=|[\w.-]+==)[\w.+]+( ; .*)?", line) for line in lines)
    pinned = {re.split(r"[<=]=", line)[0].lower() for line in lines}
    build = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    needed = [*re.findall(r'"(.*?)"', build), *metadata.requires("contrastive-kernels")]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in needed} - {"contrastive-kernels"}
    assert names <= pinned


def test_extension_is_linked_with_neither_torch_nor_cuda():
    try:
        linked = subprocess.run(["ldd", extension().__file__], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("no ldd on this machine")
    for unwanted in ("libtorch", "libc10", "libcudart", "libpython"):
        assert unwanted not in linked


def test_the_extension_belongs_to_the_package():
    """What setup.py compiled in is what is here; a wheel knows its version alone."""
    built = extension()._built_from
    assert built == (ck.__version__, sources.digest(ROOT)) and len(built[1]) == 16
    assert sources.complaint_about(extension(), ck.__version__, ROOT) is None
    assert sources.complaint_about(extension(), ck.__version__, ROOT / "docs") is None, "no checkout"


@pytest.mark.parametrize("built", [("0.0.1", "here"), None], ids=["of another version", "of before it was told"])
def test_an_extension_of_another_version_is_named(built, tmp_path):
    module = SimpleNamespace(__file__="_C.so", **({} if built is None else {"_built_from": built}))
    for root, remedy in ((ROOT, "setup.py build_ext"), (tmp_path, "install contrastive-kernels anew")):
        said = sources.complaint_about(module, ck.__version__, root)
        assert f"of version {built[0] if built else 'unknown'}, not of this" in said and remedy in said


def test_a_checkout_refuses_an_extension_of_other_sources(tmp_path):
    """Any file of csrc that was changed, added or renamed; the import says what to do."""
    extension()
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "setup.py").touch()
    (tmp_path / "contrastive_kernels").symlink_to(ROOT / "contrastive_kernels")

    def imported():
        command = [sys.executable, "-c", "import contrastive_kernels as ck; print(ck.__version__)"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    result = imported()
    assert result.returncode == 0 and result.stdout.strip() == ck.__version__, result.stderr
    seen = {sources.digest(tmp_path)}
    (tmp_path / "csrc/cpu/dispatch.cpp").open("a").write("// more\n")
    seen.add(sources.digest(tmp_path))
    (tmp_path / "csrc/new.h").touch()
    seen.add(sources.digest(tmp_path))
    (tmp_path / "csrc/new.h").rename(tmp_path / "csrc/newer.h")
    seen.add(sources.digest(tmp_path))
    assert len(seen) == 4
    result = imported()
    assert result.returncode != 0
    assert re.search(r"ImportError: the compiled extension .* is of other sources, .*; rebuild it in", result.stderr)


def test_one_openmp_runtime_in_the_process():
    extension()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc on this machine")
    script = "import contrastive_kernels._C; print(open('/proc/self/maps').read())"
    runtimes = {line.split()[-1] for line in run_python("-c", script).splitlines() if "omp" in Path(line).name}
    assert len(runtimes) == 1, runtimes


def test_documents_link_to_what_is_there():
    """In a checkout and, by MANIFEST.in, in the sdist."""
    linked = 0
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
            linked += 1
    assert linked > 5


def test_report_names_versions_and_backends():
    report = run_python("-m", "contrastive_kernels")
    for word in (ck.__version__, "torch", *ck.list_backends()):
        assert word in report


@pytest.mark.parametrize(
    "error", ["ImportError('libfor.so: no such file')", "ModuleNotFoundError(f'No module named {name!r}', name=name)"]
)
def test_report_says_why_the_extension_is_missing(error):
    script = f"""
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "contrastive_kernels._C":
            raise {error}

sys.meta_path.insert(0, Blocked())
runpy.run_module("contrastive_kernels", run_name="__main__")
"""
    report = run_python("-c", script)
    assert "libfor.so: no such file" in report or "No module named 'contrastive_kernels._C'" in report
    assert "circular" not in report
    assert ck.__version__ in report


def find_python(**environment):
    return subprocess.run(["/bin/sh", ROOT / "scripts/find_python.sh"], env=environment, capture_output=True, text=True)


def test_find_python_passes_over_what_does_not_run(tmp_path):
    shim = tmp_path / "python3"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    (tmp_path / "python3.12").symlink_to(Path(sys.executable).resolve())
    assert find_python(PATH=str(tmp_path)).stdout.strip() == str(tmp_path / "python3.12")
    (tmp_path / "python3.12").unlink()
    result = find_python(PATH=str(tmp_path))
    assert result.returncode == 1
    assert "3.10" in result.stderr
    assert "python3-venv" in result.stderr


def test_find_python_takes_the_one_that_is_named():
    assert find_python(PYTHON=sys.executable).stdout.strip() == sys.executable
    result = find_python(PYTHON="no-such-python")
    assert result.returncode == 1
    assert "no-such-python" in result.stderr

"""Nothing imports another library before it is asked for, and what is missing says how to get it."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.integrations import common

MODULES = {
    "lightly": "lightly",
    "metric_learning": "pytorch_metric_learning",
    "open_clip": "open_clip",
    "sentence_transformers": "sentence_transformers",
    "transformers": "transformers",
}


def test_the_list_is_whole():
    assert set(ck.integrations.__all__) == set(MODULES)
    assert set(MODULES) <= set(dir(ck.integrations))
    with pytest.raises(AttributeError, match=r"'contrastive_kernels\.integrations' has no attribute 'open_flip'"):
        _ = ck.integrations.open_flip


def test_importing_the_package_imports_no_other_library():
    """The compiler neither, which takes as long as torch: who does not compile does not wait for it."""
    heavy = [*MODULES.values(), "torch._dynamo", "sympy", "triton"]
    script = (
        "import sys, contrastive_kernels, contrastive_kernels.integrations as i; dir(i);"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_library_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    monkeypatch.delitem(sys.modules, f"contrastive_kernels.integrations.{name}", raising=False)
    monkeypatch.delitem(vars(ck.integrations), name, raising=False)
    with pytest.raises(ImportError, match=rf"integrations\.{name}: expected .*contrastive-kernels\[{name}\]'"):
        getattr(ck.integrations, name)


def test_a_library_that_does_not_import_is_not_called_missing(monkeypatch):
    """Another version, say, without a class that is wanted."""
    monkeypatch.setitem(sys.modules, "open_clip", types.ModuleType("open_clip"))
    monkeypatch.delitem(sys.modules, "contrastive_kernels.integrations.open_clip", raising=False)
    monkeypatch.delitem(vars(ck.integrations), "open_clip", raising=False)
    with pytest.raises(ImportError, match=r"expected the open_clip_torch that .*; importing the one there is: can"):
        _ = ck.integrations.open_clip


def test_what_is_left_is_said_once(monkeypatch):
    monkeypatch.setattr(common, "_said", set())
    with pytest.warns(UserWarning, match="library.Loss: a loss of two is computed by the library's own code"):
        common.leave("library.Loss", "a loss of two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        common.leave("library.Loss", "a loss of two")
    with pytest.warns(UserWarning, match="of three"):
        common.leave("library.Loss", "a loss of three")


class Theirs:
    pass


class Ours(Theirs):
    pass


@pytest.fixture
def library(monkeypatch):
    """A library of two modules that both hold a class, and one beside it whose name begins alike."""
    made = {name: types.ModuleType(name) for name in ("library", "library.loss", "library_of_others")}
    for name, module in made.items():
        module.Loss = Theirs  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_classes_are_replaced_in_all_modules_of_a_library(library):
    common.replace("library", {Theirs: Ours})
    assert [module.Loss for module in library.values()] == [Ours, Ours, Theirs]


def test_replaced_undoes_what_it_did_and_what_came_of_it(library):
    with common.replaced("library", {Theirs: Ours}):
        assert library["library"].Loss is Ours
        library["library.loss"].Again = library["library"].Loss
    assert {library["library"].Loss, library["library.loss"].Loss, library["library.loss"].Again} == {Theirs}
    common.replace("library", {Theirs: Ours})
    with common.replaced("library", {Theirs: Ours}):
        pass
    assert library["library"].Loss is Ours, "what was installed before stays"


def test_scaled_gradient():
    """Bit for bit the same number."""
    scale = torch.tensor(0.1, requires_grad=True)
    scaled = common.scaled_gradient(scale, 3)
    scaled.backward()
    assert torch.equal(scaled, scale) and scale.grad == 3
    assert common.scaled_gradient(2.0, 3) == 2.0

"""The public names of the package and of the pipeline."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import FunctionType

import pytest

import dllm
from dllm.pipelines import llada

OTHER_NAMES = {"infill": "infilling"}


def test_every_public_name_resolves() -> None:
    for name in dllm.__all__:
        assert getattr(dllm, name).__name__ == OTHER_NAMES.get(name, name)
    for name in llada.__all__:
        assert getattr(llada, name).__name__ == OTHER_NAMES.get(name, name)


def test_the_two_doors_lead_to_the_same_things() -> None:
    for name in {*dllm.__all__} & {*llada.__all__}:
        assert getattr(dllm, name) is getattr(llada, name), name


def test_names_are_listed_before_they_are_used() -> None:
    # in a process of its own: here they have been used
    script = "import dllm; missing = {*dllm.__all__, '__version__'} - {*dir(dllm)}; assert not missing, missing"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert dir(dllm) == sorted(dir(dllm))
    assert dllm.__all__ == sorted(dllm.__all__)
    assert llada.__all__ == sorted(llada.__all__)


@pytest.mark.parametrize("module", [dllm, llada])
def test_a_name_that_is_not_there_is_an_attribute_error(module: object) -> None:
    name = module.__name__
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'genrate'"):
        module.genrate  # noqa: B018  asking is the test
    assert not hasattr(module, "genrate")


def test_generate_is_the_function_although_a_module_has_its_name() -> None:
    submodule = importlib.import_module("dllm.pipelines.llada.generate")
    from dllm.pipelines.llada import generate

    for found in (llada.generate, generate, dllm.generate, submodule.generate):
        assert isinstance(found, FunctionType)
        assert found is submodule.generate


@pytest.mark.system
def test_generate_is_the_function_whatever_is_imported_first() -> None:
    # each in a process of its own, which is born with all that takes long to import
    script = """
import os
import transformers.modeling_utils
import transformers.generation

for first in (
    "import dllm.pipelines.llada.generate",
    "from dllm.pipelines.llada.generate import infilling",
    "import dllm; dllm.infilling",
):
    if (child := os.fork()) == 0:
        exec(first)
        from dllm.pipelines import llada
        os._exit(llada.generate.__class__.__name__ != "function")
    assert os.waitpid(child, 0)[1] == 0, first
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

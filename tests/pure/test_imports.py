"""Imports run in one direction only: the layers of docs/data-way.md."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "zerompi"

# A module or sub-package imports from its own layer and the layers below it only.
LAYERS = [
    {
        "errors",
        "version",
        "dtypes",
        "layout",
        "placement",
        "placeholder",
        "report",
        "memory",
    },
    {"device"},
    {"kernels"},
    {
        "launch",
        "activity",
        "watchdog",
        "stop",
        "job_time",
        "agreement",
        "arrays",
        "topology",
        "traffic",
        "nested",
        "comm_thread",
        "cuda_aware",
        "local_device",
    },
    {"collectives"},
    {"autograd", "precision", "quantize", "units"},
    {
        "attendance",
        "regions",
        "context",
        "segment",
        "gradients",
        "gather",
        "refresh",
        "unit",
        "place",
        "buffers",
        "registry",
    },
    {
        "hooks",
        "forwards",
        "linear",
        "saved",
        "schedule",
        "optimizer",
        "gradient_norms",
        "adamw",
        "blocked_step",
        "join",
        "meta",
        "generators",
        "state",
        "parts",
        "guards",
        "zero_grad",
        "full_values",
        "checkpoints",
        "restore",
        "checkpoint",
        "accounting",
    },
    {"zero", "api"},
    {"train", "bench", "cli"},
]
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}

# What these parts must not know of, at any layer.
FORBIDDEN = {
    "errors": {"torch", "mpi4py", "numpy"},
    "version": {"torch", "mpi4py", "numpy"},
    "layout": {"torch", "mpi4py", "numpy"},
    "placement": {"torch", "mpi4py", "numpy"},
    "dtypes": {"mpi4py"},
    "report": {"mpi4py"},
    "memory": {"mpi4py", "numpy"},
    "device": {"mpi4py"},
    "kernels": {"mpi4py"},
    "nested": {"mpi4py"},
    "units": {"mpi4py"},
    "precision": {"mpi4py"},
    "quantize": {"mpi4py"},
    "context": {"mpi4py"},
    "segment": {"mpi4py"},
    "gradients": {"mpi4py"},
    "unit": {"mpi4py"},
    "attendance": {"mpi4py"},
    "hooks": {"mpi4py"},
    "join": {"mpi4py"},
}
OPTIONAL = ["typer", "rich", "transformers", "tensorboardX", "peft", "cupy", "numba"]
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem[0] != "_"
)


def part_of(path: Path) -> str:
    """The module or sub-package directly under zerompi that holds `path`."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, anywhere in it."""
    package = ["zerompi", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def ours(path: Path) -> Iterator[str]:
    """The parts of zerompi that a file imports; "" for the package itself."""
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "zerompi":
            yield parts[1] if len(parts) > 1 and parts[1] in LAYER_OF else ""


def test_every_module_has_a_layer():
    assert {part_of(path) for path in FILES} <= set(LAYER_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_its_own_or_lower_layers(path):
    own = LAYER_OF[part_of(path)]
    layers = {name: LAYER_OF[name] for name in ours(path) if name}
    assert {name: layer for name, layer in layers.items() if layer > own} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_top_layer_uses_what_the_package_exports(path):
    if LAYER_OF[part_of(path)] == len(LAYERS) - 1:
        return
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "zerompi"
    }
    assert used == set()


@pytest.mark.parametrize("part", FORBIDDEN)
def test_a_module_does_not_know_of_what_it_must_not(part):
    files = [path for path in FILES if part_of(path) == part]
    packages = {name.split(".")[0] for path in files for name in imported(path)}
    assert packages & FORBIDDEN[part] == set()
    assert files


def test_the_device_package_alone_imports_cupy():
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "cupy" for name in imported(path))
    }
    assert users == {"device"}


def test_the_package_imports_neither_the_command_line_nor_optional_packages():
    program = (
        "import sys, zerompi, torch; "
        f"print(*(name for name in {[*OPTIONAL, 'zerompi.cli', 'zerompi.train']} "
        "if name in sys.modules), torch.cuda.is_initialized())"
    )
    # Without the launcher's variables the process is alone, whatever started this one.
    prefixes = ("PMI", "OMPI_", "PRTE_", "HYDRA_", "MPI_LOCAL", "SLURM_", "PALS_", "MV2_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        cwd=PACKAGE.parent,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False"]

"""What the files of a deployment say about a shipment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from optin_export.recipe import Recipe
from optin_export.ship.manifest import read_manifest
from optin_export.ship.own_config import server_arguments
from optin_export.ship.shipping import Shipped

MIB = 2**20
#: Memory of a tritonserver without models, and of a stub process of its python backend, in MiB: our assumption, on the
#: large side; the models' part is measured.
SERVER_MIB, PYTHON_MIB = 512, 256


@dataclass(frozen=True)
class Facts:
    """name: the pruned model. models: every model. entry: the model that clients ask.

    image: with its tag. packages: what the image lacks. arguments: more flags of tritonserver. repository: its path,
    relative to the folder of the files. cpus, memory_mib: what the server needs. exact: the models' part is measured.
    """

    name: str
    models: tuple[str, ...]
    entry: str
    image: str
    packages: tuple[str, ...]
    arguments: tuple[str, ...]
    repository: str
    gpu: bool
    cpus: int
    memory_mib: int
    exact: bool

    @property
    def app(self) -> str:
        """The name as Kubernetes allows it: a label of the DNS."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:50].strip("-") or "model"

    @property
    def own_image(self) -> str:
        return f"{self.app}-triton:latest"

    def command(self, repository: str) -> list[str]:
        return ["tritonserver", f"--model-repository={repository}", *self.arguments]


def facts_of(shipped: Shipped, recipe: Recipe, folder: Path) -> Facts:
    """The facts of a shipment, for files in `folder`."""
    section, name = recipe.ship, shipped.names[0]
    whole = f"{name}-ensemble"
    python = section.backend == "python"
    memory, exact, cpus = float(SERVER_MIB), True, 0
    for model in shipped.names:
        for one in read_manifest(shipped.repository / model).get("instance", {}).values():
            exact = exact and "memory_bytes" in one
            memory += section.instances * (one.get("memory_bytes", 0) / MIB + PYTHON_MIB * python)
            cpus = max(cpus, section.instances * one["threads"])
    if whole in shipped.names:
        memory += section.instances * PYTHON_MIB
    return Facts(
        name=name,
        models=shipped.names,
        entry=whole if whole in shipped.names else name,
        image=shipped.image.tag,
        packages=shipped.image.packages,
        arguments=server_arguments(section.config),
        repository=Path(os.path.relpath(shipped.repository.resolve(), folder.resolve())).as_posix(),
        gpu=section.backend == "tensorrt",
        cpus=max(1, cpus),
        memory_mib=-(-int(memory * 1.25) // 64) * 64,
        exact=exact,
    )

"""QM9's message-passing network, of torch_geometric: an edge network, a GRU and Set2Set on complete graphs.

Source: Gilmer et al., arXiv 1704.01212, with the sizes of Nash-MTL's QM9 protocol. Hybridisation and aromaticity of the
atoms, which that protocol reads from a chemistry library, are not in our data: bonds are told by their lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from dbmtl_kernels.bench.results import BenchError
from torch import Tensor, nn

from . import data
from .networks import Network
from .tasks import Task

DIM, ROUNDS, EDGE = 64, 3, 5
ATOM = len(data.ELEMENTS) + 2  # which element, its charge, hydrogens bound to it
RADII = (0.32, 0.75, 0.71, 0.63, 0.64)  # single-bond covalent radii in angstrom, Pyykkö and Atsumi 2009
BONDS = (0.80, 0.89, 0.96, 1.15)  # of the sum of radii: up to triple, double, aromatic or partial, single


def qm9(folder: Path) -> tuple[data.Array, data.Array]:
    """(M, 29, 4) charges and places in angstrom, and (M, 11) targets."""
    found = data.molecules(folder)
    packed = np.concatenate([found.charges[..., None], found.places], 2)
    return packed.astype(np.float32), found.targets.astype(np.float32)


def generated(folder: Path) -> tuple[data.Array, data.Array]:
    """Random molecules of four to nine atoms, with targets that follow from charges and distances."""
    del folder
    rng = np.random.default_rng(5)
    packed = np.zeros((200, data.MOST_ATOMS, 4), np.float32)
    targets = np.zeros((200, 11), np.float32)
    for molecule, target in zip(packed, targets, strict=True):
        atoms = rng.integers(4, 10)
        molecule[:atoms, 0] = rng.choice(data.CHARGES, atoms)
        molecule[:atoms, 1:] = 1.5 * rng.standard_normal((atoms, 3))
        size = np.linalg.norm(molecule[:atoms, 1:], axis=1).mean()
        target[:] = molecule[:, 0].sum() * np.arange(1, 12) + size * np.arange(11)
    return packed, targets


def library() -> Any:
    """torch_geometric's layers.

    Raises:
        BenchError: it is not installed.
    """
    try:
        from torch_geometric import nn as layers
    except ImportError as error:
        raise BenchError(f"{error}. Needed: pip install 'dbmtl-kernels[qm9]'") from error
    return layers


def edges(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(M, 29, 4) molecules to a graph of all: its atoms, edges, their attributes, and the molecule of each atom.

    Returns:
        (N, 7) atoms; (2, E) indices of all pairs of a molecule's atoms; (E, 5) four classes of bonds, and the
        distance; (N,) molecules.
    """
    there = packed[:, :, 0] > 0
    molecule, _ = there.nonzero(as_tuple=True)
    charges, places = packed[there][:, 0], packed[there][:, 1:]
    element = (charges[:, None] == charges.new_tensor(data.CHARGES)).float()
    numbers = torch.full_like(there, -1, dtype=torch.int64)
    numbers[there] = torch.arange(len(molecule), device=packed.device)
    pairs = there[:, :, None] & there[:, None, :] & ~torch.eye(there.shape[1], dtype=torch.bool, device=packed.device)
    source = numbers[:, :, None].expand(pairs.shape)[pairs]
    target = numbers[:, None, :].expand(pairs.shape)[pairs]
    distance = (places[source] - places[target]).norm(dim=1)
    radius = element @ element.new_tensor(RADII)
    relative = distance / (radius[source] + radius[target])
    kind = torch.bucketize(relative, relative.new_tensor(BONDS))  # 4: no bond
    bonds = nn.functional.one_hot(kind, 5)[:, :4].float()
    hydrogens = torch.zeros_like(charges).index_add_(0, target, (kind < 4) * element[source, 0])
    atoms = torch.cat([element, charges[:, None] / 9, hydrogens[:, None] / 4], 1)
    return atoms, torch.stack([source, target]), torch.cat([bonds, distance[:, None]], 1), molecule


class Trunk(nn.Module):
    """(M, 29, 4) molecules to (M, 64) features."""

    def __init__(self) -> None:
        super().__init__()
        layers = library()
        self.begin = nn.Linear(ATOM, DIM)
        edge = nn.Sequential(nn.Linear(EDGE, 128), nn.ReLU(), nn.Linear(128, DIM * DIM))
        self.messages = layers.NNConv(DIM, DIM, edge, aggr="mean")
        self.gate = nn.GRU(DIM, DIM)
        self.gather = layers.aggr.Set2Set(DIM, processing_steps=3)
        self.end = nn.Linear(2 * DIM, DIM)

    def forward(self, packed: Tensor) -> Tensor:
        atoms, pairs, attributes, molecule = edges(packed)
        x = self.begin(atoms).relu()
        state = x[None]
        for _ in range(ROUNDS):
            message = self.messages(x, pairs, attributes).relu()
            x, state = self.gate(message[None], state)
            x = x[0]
        return self.end(self.gather(x, molecule, dim_size=len(packed))).relu()


def network(inputs: Tensor, tasks: tuple[Task, ...]) -> Network:
    """Linear heads on the trunk."""
    del inputs
    return Network(Trunk(), [nn.Linear(DIM, task.outputs) for task in tasks])

import sys
from pathlib import Path

import pytest
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))


def small_network(work):
    """Of the same kind as ResNet18, and without torchvision."""
    from vision.networks import Network

    network = Network()
    features = nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    network.shared = nn.Sequential(*features, nn.BatchNorm1d(16), nn.Dropout(0.5))
    network.heads = nn.ModuleList(nn.Linear(16, work.classes) for _ in work.tasks)
    return network


@pytest.fixture
def small_office(monkeypatch):
    """examples/office.py with a small network."""
    pytest.importorskip("PIL")
    import office

    monkeypatch.setattr(office.Domains, "network", small_network)

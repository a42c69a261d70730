"""What rots unseen: versions, addresses, paths and commands in the files around the code."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PAGES = [*ROOT.glob("*.md"), GITHUB / "PULL_REQUEST_TEMPLATE.md", *FORMS, *(ROOT / "docs").glob("*.md")]
PROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()


def told(key):
    return re.search(f'^{key} = "(.+)"$', PROJECT, re.M)[1]


def loaded(path):
    return yaml.safe_load(path.read_text())


def steps(path):
    return [step for job in loaded(path)["jobs"].values() for step in job["steps"]]


def targets_of(command):
    """The targets of a make command."""
    words = shlex.split(command)[1:]
    return [word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)]


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = loaded(ROOT / "CITATION.cff")
    assert citation["version"] == told("version")
    assert citation["license"] == told("license")
    assert citation["repository-code"] == told("Repository")
    (paper,) = citation["references"]
    assert paper["url"] == told("Paper")
    assert paper["identifiers"][0]["value"] == "arXiv:" + told("Paper").rsplit("/", 1)[1]
    assert [one["family-names"] for one in paper["authors"]] == [
        "Lin",
        "Jiang",
        "Ye",
        "Zhang",
        "Chen",
        "Chen",
        "Liu",
        "Tsang",
        "Kwok",
    ]
    assert f"\n## {told('version')} (" in (ROOT / "CHANGELOG.md").read_text()


def test_every_address_of_the_project_is_that_of_pyproject():
    home = told("Repository")
    files = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", ROOT / "mkdocs.yml", *GITHUB.rglob("*.yml"), *PAGES]
    found = [
        one for path in files for one in re.findall(r"https://[\w.]*github[\w.]*/[\w./-]*dbmtl[\w-]*", path.read_text())
    ]
    assert len(found) > 5
    assert {re.match(r"https://[^/]+/[^/]+/[^/]+", one)[0] for one in found} == {home}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_are_there(path):
    commands = [step["run"] for step in steps(path) if "run" in step]
    assert commands
    for command in commands:
        assert command.startswith("make "), command
        assert targets_of(command)
        assert set(targets_of(command)) <= set(TARGETS), command


def test_every_target_has_a_recipe(tmp_path):
    for target in TARGETS:
        command = ["make", "--dry-run", target, f"VENV={tmp_path}/venv", f"DIST={tmp_path}/dist"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) > 0
        assert "Nothing to be done" not in done.stdout, target


def test_workflows_test_the_lowest_and_the_newest():
    rows = loaded(GITHUB / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    lowest = {
        "python": told("requires-python").removeprefix(">="),
        "torch": "torch==" + re.search(r"torch>=([\d.]+)", PROJECT)[1],
    }
    assert any(row["python"] == lowest["python"] and row["torch"].startswith(lowest["torch"]) for row in rows)
    assert re.search(r"^TORCH \?= (.+)$", MAKEFILE, re.M)[1] in {row["torch"] for row in rows}
    assert "torch" in {row["torch"] for row in rows}  # whatever is the newest
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert {row["python"] for row in rows} <= set(classified)
    assert lowest["python"] == classified[0]


def test_a_release_is_tagged_as_the_links_in_its_page():
    assert loaded(GITHUB / "workflows" / "wheels.yml")[True]["push"]["tags"] == ["v*"]  # YAML reads "on" as True
    assert "git tag -a vX.Y.Z" in (ROOT / "RELEASING.md").read_text()
    assert "/v{version}/" in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_pages_are_targets(path):
    text = path.read_text()
    blocks = "".join(re.findall(r"^```.*?^```", text, re.M | re.S))
    commands = re.findall(r"`(make [a-z][^`\n]*)`", text) + re.findall(r"^(make [a-z][^#\n]*)", blocks, re.M)
    for command in commands:
        assert set(targets_of(command)) <= set(TARGETS), f"{path.name}: {command}"


AROUND = ["CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", ".github/PULL_REQUEST_TEMPLATE.md"]


@pytest.mark.parametrize("path", [*(ROOT / name for name in AROUND), *FORMS], ids=lambda path: path.name)
def test_paths_in_the_files_around_the_code_exist(path):
    for name in re.findall(r"`([\w.-]+(?:/[\w.-]*)+|[\w-]+\.(?:md|toml|cff|py))`", path.read_text()):
        folders = (ROOT, ROOT / "python" / "dbmtl_kernels")
        assert name.startswith(("dist/", "out/")) or any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_what_github_takes(path):
    form = loaded(path)
    assert {"name", "description", "body"} <= set(form) <= {"name", "description", "body", "labels", "title"}
    inputs = [one for one in form["body"] if one["type"] != "markdown"]
    assert len({one["id"] for one in inputs}) == len(inputs) > 0
    for one in inputs:
        assert one["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert one["attributes"]["label"]
        assert set(one) <= {"type", "id", "attributes", "validations"}
    assert any(one.get("validations", {}).get("required") for one in inputs)


def test_a_commit_is_checked_as_make_checks():
    """Each hook runs a command of `make lint types`, or mends what that finds."""
    (repository,) = loaded(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["entry"].removeprefix("sh tools/hook.sh ").removesuffix(" --fix") for hook in repository["hooks"]}
    recipes = re.findall(r"^(?:lint|types): .*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    made = [line.strip().removeprefix("$(BIN)/") for recipe in recipes for line in recipe.splitlines()]
    assert hooks == {re.sub(r"( --check)? \.$", "", line) for line in made}


def test_what_install_says_to_set_is_read():
    said = set(re.findall(r"\bDBMTL_\w+", (ROOT / "docs" / "install.md").read_text()))
    backends = ROOT / "python" / "dbmtl_kernels" / "backends" / "__init__.py"
    read = set(re.findall(r'"(DBMTL_\w+)"', (ROOT / "setup.py").read_text() + backends.read_text()))
    assert {"DBMTL_CUDA", "DBMTL_CUDA_ARCHS", "DBMTL_BUILD_NATIVE"} <= said <= read

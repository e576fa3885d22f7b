"""What is shipped: the wheel, the pins, the image, the compose file. Uses no network."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions, requires, version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def constraints() -> dict[str, str]:
    """The versions that are pinned for this Python."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    exact = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in here}
    assert len(exact) == len(here), "a name is pinned twice"
    return exact


def install_commands(path: Path, pip: str) -> list[str]:
    """The `pip install` lines of a Makefile or Dockerfile, with variables spelled one way."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    commands = (line.partition("install ")[2] for line in lines if line.startswith(pip))
    return [re.sub(r"\$[({](\w+)[)}]", r"$\1", command) for command in commands]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("imprint-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_package_and_nothing_else(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"imprint"}
    assert {"imprint/__init__.py", "imprint/py.typed"} <= wheel_names
    for folder in ("models", "adapters", "server"):
        tracked = (path for path in (ROOT / folder).rglob("*.py"))
        expected = {f"imprint/{path.relative_to(ROOT).as_posix()}" for path in tracked}
        assert expected <= wheel_names
    assert not [name for name in wheel_names if "tests/" in name or "__pycache__" in name]


def test_wheel_holds_the_bundled_model(wheel_names: set[str]) -> None:
    folder = "imprint/models/pretrained/imprint-tiny"
    files = ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    assert [name for name in files if f"{folder}/{name}" not in wheel_names] == []


def test_wheel_holds_the_page(wheel_names: set[str]) -> None:
    files = {f"imprint/server/static/{path.name}" for path in (ROOT / "server/static").iterdir()}
    assert len(files) > 10
    assert files <= wheel_names


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    code = (ROOT / "src/imprint/__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{project["version"]}"' in code
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_installed_requirement_is_pinned() -> None:
    pins = constraints()
    waiting = [("imprint", frozenset({"dev"}))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in requires(name) or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": e}) for e in extras | {""}):
                continue
            needed = canonicalize_name(requirement.name)
            assert needed in pins, f"{name} needs {needed}, which constraints.txt does not pin"
            assert requirement.specifier.contains(pins[needed], prereleases=True), line
            assert Version(version(needed)).public == pins[needed], f"{needed} is not as pinned"
            waiting.append((needed, frozenset(requirement.extras)))


def test_pins_can_be_installed_on_every_python_that_is_promised() -> None:
    """Also on Debian 12's 3.11.2, which is older than some releases of 3.11 ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (oldest,) = SpecifierSet(project["requires-python"])
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    unbound = [Requirement(line) for line in lines if line and "#" not in line and ";" not in line]
    installed = {canonicalize_name(found.name): found for found in distributions()}
    asked = {
        pin.name: installed[canonicalize_name(pin.name)].metadata.get("Requires-Python") or ""
        for pin in unbound
        if canonicalize_name(pin.name) in installed
    }
    assert len(asked) > 50
    lowest = f"{oldest.version}.0"
    assert {name: text for name, text in asked.items() if lowest not in SpecifierSet(text)} == {}


def test_image_installs_as_make_does() -> None:
    make = install_commands(ROOT / "Makefile", "$(PIP) install")
    image = install_commands(ROOT / "Dockerfile", "RUN python -m pip")
    assert make[-1].endswith(" --editable '.[dev]'")
    # The one difference: the image holds no development tools and no link to the sources.
    assert [*make[:-1], make[-1].replace("--editable '.[dev]'", "'.[otel]'")] == image
    assert all("--constraint constraints.txt" in command for command in image)


def test_the_rehearsal_knows_every_instruction() -> None:
    spec = spec_from_file_location("rehearse_image", ROOT / "deploy" / "rehearse_image.py")
    assert spec is not None
    assert spec.loader is not None
    rehearsal = module_from_spec(spec)
    sys.modules[spec.name] = rehearsal  # dataclasses look it up
    spec.loader.exec_module(rehearsal)
    found = list(rehearsal.instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")))
    assert [word for word, _ in found].count("FROM") == 2
    assert ("USER", "imprint") in found
    with pytest.raises(ValueError, match="does not know HEALTHCHECK"):
        list(rehearsal.instructions("HEALTHCHECK NONE"))


def test_image_runs_without_root() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    final = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER (?!root|0\b)\S+$", final, re.MULTILINE)


def test_what_the_image_copies_is_enough_to_build_the_package(
    wheel_names: set[str], tmp_path: Path
) -> None:
    stage = (ROOT / "Dockerfile").read_text(encoding="utf-8").rpartition("\nFROM ")[0]
    for line in re.findall(r"^COPY (.*)$", stage, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            whole = (ROOT / source).is_dir()
            place = tmp_path / target if whole else tmp_path / target / Path(source).name
            place.parent.mkdir(parents=True, exist_ok=True)
            if whole:
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "out").glob("imprint-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == wheel_names
        archive.extractall(tmp_path / "root")
    # -P: nothing of this clone may be found; the environment has what constraints.txt pins.
    started = subprocess.run(
        [sys.executable, "-P", "-m", "imprint.server.cli", "--version"],
        cwd=tmp_path / "root",
        env={"PYTHONPATH": str(tmp_path / "root")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert started.stdout.startswith("imprint "), started.stderr


def test_image_context_holds_what_is_copied() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sources = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source.split('/')[0]}" in allowed

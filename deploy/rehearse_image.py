"""The Dockerfile's commands in a clean root, and the image's start as compose starts it, without a
container engine: `make rehearsal`, as root on Linux with Debian's python3.11-venv.

The root has this machine's /usr, read-only, in the place of the base image, and nothing else but
what the Dockerfile copies and makes: no home, no /opt, no /usr/local, no packages of Python but its
own. Limits: /usr is no Debian slim; network and processes are those of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
SET_LATER = ("ENTRYPOINT", "CMD")
KNOWN = frozenset(("FROM", "ARG", "WORKDIR", "RUN", "ENV", "COPY", "USER", "VOLUME", "EXPOSE"))
OF_THIS_MACHINE = ("passwd", "group", "shadow", "login.defs", "nsswitch.conf", "resolv.conf")
OF_THIS_MACHINE += ("hosts", "ld.so.cache", "ssl")
PASSED_ON = re.compile(r"PIP_.*|SSL_CERT_FILE|(https?|no)_proxy", re.IGNORECASE)
PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
KEY = "sk-rehearsal-0123456789"
READY_S = 120.0
END_S = 45.0
QUESTION = f"""
import json, urllib.request
body = {{"document": "The code of the door is 4711. " * 20, "questions": ["What is the code?"]}}
head = {{"Content-Type": "application/json", "Authorization": "Bearer {KEY}"}}
url = "http://127.0.0.1:8765/v1/answers"
request = urllib.request.Request(url, json.dumps(body).encode(), head)
print(urllib.request.urlopen(request).read().decode())
"""


@dataclass
class Stage:
    """One image that is being made: its root, and what instructions have set for the later ones."""

    root: Path
    name: str
    environ: dict[str, str]
    folder: str = "/"
    user: str = "root"
    words: dict[str, list[str]] = field(default_factory=dict)
    """Of ENTRYPOINT and CMD."""

    def call(self, command: list[str], user: str, *wrapped: str) -> list[str]:
        """What runs `command` in this root and folder; `wrapped` runs in between."""
        variables = [f"{name}={value}" for name, value in self.environ.items()]
        inside = ["env", "-i", *variables, "sh", "-c", f'cd "{self.folder}" && exec "$@"', "sh"]
        return ["chroot", f"--userspec={user}", str(self.root), *wrapped, *inside, *command]

    def place(self, path: str) -> Path:
        """Where a path of the image lies on this machine."""
        return self.root / os.path.join(self.folder, path).lstrip("/")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction of a Dockerfile with what follows it. Raises ValueError for one that is not
    rehearsed here."""
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        if word and not line.startswith("#"):
            if word not in KNOWN and word not in SET_LATER:
                raise ValueError(f"the rehearsal does not know {word}")
            yield word, rest.strip()


def build(folder: Path, python: Path, shared: list[Path]) -> Stage:
    """All stages, one after another; the last one."""
    stages: list[Stage] = []
    for word, rest in instructions((REPOSITORY / "Dockerfile").read_text("utf-8")):
        say(f"{word} {rest}")
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            if not image.startswith(f"python:{python.name.removeprefix('python')}-"):
                raise ValueError(f"{image} has another version than {python}")
            stages.append(begin(folder / f"stage-{len(stages)}", name, python, shared))
        else:
            follow(word, rest, stages)
    return stages[-1]


def begin(folder: Path, name: str, python: Path, shared: list[Path]) -> Stage:
    """A clean root."""
    root, local = folder / "root", folder / "local"
    for part in ("usr", "etc", "proc", "dev", "tmp", "run/secrets", "var/lib", "root", "home"):
        (root / part).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    for link in ("bin", "sbin", "lib", "lib64"):
        (root / link).symlink_to(f"usr/{link}")
    (local / "bin").mkdir(parents=True)
    (local / "bin" / "python").symlink_to(python)
    for part in (Path("/usr"), *shared):
        mount_below(root, part, read_only=True)
    mount("--bind", str(local), str(root / "usr" / "local"))
    for part in (Path("/proc"), Path("/dev")):
        mount_below(root, part, read_only=False)
    for name_ in OF_THIS_MACHINE:
        source, target = Path("/etc") / name_, root / "etc" / name_
        if source.is_dir():
            shutil.copytree(source, target, ignore_dangling_symlinks=True)
        elif source.exists():
            shutil.copy(source, target)
    passed = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    return Stage(root, name, {"PATH": PATH, "HOME": "/root", **passed})


def follow(word: str, rest: str, stages: list[Stage]) -> None:
    """Do what an instruction says to the newest stage."""
    stage = stages[-1]
    rest = re.sub(r"\$\{?(\w+)\}?", lambda found: stage.environ.get(found[1], found[0]), rest)
    match word:
        case "ARG":
            name, _, value = rest.partition("=")
            stage.environ[name] = os.environ.get(name, value)
        case "ENV":
            stage.environ |= dict(pair.split("=", 1) for pair in rest.split())
        case "WORKDIR":
            stage.folder = rest
            stage.place("").mkdir(parents=True, exist_ok=True)
        case "USER":
            stage.user = rest
        case "RUN":
            subprocess.run(stage.call(["sh", "-c", rest], stage.user), check=True)
        case "COPY":
            copy(rest.split(), stage, stages)
        case "ENTRYPOINT" | "CMD":
            stage.words[word] = json.loads(rest)


def copy(words: list[str], stage: Stage, stages: list[Stage]) -> None:
    """From the repository, as far as .dockerignore lets it in, or from another stage."""
    root = REPOSITORY
    if words[0].startswith("--from="):
        name = words.pop(0).removeprefix("--from=")
        (root,) = (other.root for other in stages if other.name == name)
    *sources, target = words
    let_in = (REPOSITORY / ".dockerignore").read_text("utf-8").split()
    for source in sources:
        if root is REPOSITORY and f"!{source.split('/')[0]}" not in let_in:
            raise ValueError(f"{source} is kept out by .dockerignore")
        found, place = root / source.lstrip("/"), stage.place(target)
        if found.is_dir():
            left_out = shutil.ignore_patterns("__pycache__")
            shutil.copytree(found, place, symlinks=True, dirs_exist_ok=True, ignore=left_out)
        else:
            place = place / found.name if target.endswith("/") else place
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, place)


def start(stage: Stage) -> None:
    """Start it as compose does, wait until it is healthy, ask it with its key, and end it."""
    compose = yaml.safe_load((REPOSITORY / "deploy" / "docker-compose.yml").read_text("utf-8"))
    service = compose["services"]["imprint"]
    user, _, group = service["user"].partition(":")
    close_root(stage, owner=service["user"])
    unset = re.compile(r"\$\{\w+:-(.*)\}")
    for name, value in service["environment"].items():
        stage.environ[name] = unset.sub(r"\1", str(value))
    powerless = ("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups")
    powerless += ("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")

    def call(*command: str) -> list[str]:
        return stage.call(list(command), "root", *powerless)

    server = subprocess.Popen(call(*stage.words["ENTRYPOINT"], *stage.words["CMD"]))
    try:
        healthy = call(*service["healthcheck"]["test"][1:])
        deadline = time.monotonic() + READY_S
        while subprocess.run(healthy, capture_output=True, check=False).returncode:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("it did not become healthy")
            time.sleep(1)
        say("healthy")
        subprocess.run(call("python", "-c", QUESTION), check=True)
        server.terminate()
        if status := server.wait(END_S):
            raise RuntimeError(f"it ended with status {status}")
        say("asked, answered, and ended in order")
    finally:
        server.kill()


def close_root(stage: Stage, *, owner: str) -> None:
    """The root is read-only from now on, but for the volume of the data and a temporary folder."""
    root, volume = stage.root, stage.root.with_name("volume")
    (root / "run" / "secrets" / "api_keys").write_text(f"operator:{KEY}\n", "utf-8")
    shutil.copytree(stage.place(""), volume)
    subprocess.run(["chown", "--recursive", owner, str(volume)], check=True)
    mount("--rbind", str(root), str(root))
    mount("-o", "remount,bind,ro", str(root))
    mount("--bind", str(volume), str(stage.place("")))
    mount("-t", "tmpfs", "tmpfs", str(root / "tmp"))


def mount_below(root: Path, part: Path, *, read_only: bool) -> None:
    """A folder of this machine in the same place below `root`."""
    place = root / str(part).lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    mount("--rbind", str(part), str(place))
    if read_only:
        mount("-o", "remount,bind,ro", str(place))


def mount(*arguments: str) -> None:
    """In the namespace of this process, with which it ends."""
    subprocess.run(["mount", *arguments], check=True)


def say(what: str) -> None:
    """Progress, on standard error."""
    sys.stderr.write(f"rehearsal: {what}\n")
    sys.stderr.flush()


def main() -> int:
    """Build and start in a namespace of its own; its folder is deleted outside of it, where nothing
    is mounted there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--python", type=Path, default=Path("/usr/bin/python3.11"), metavar="FILE")
    parser.add_argument(
        "--share", type=Path, action="append", default=[], metavar="FOLDER",
        help="a folder that pip needs, as an index on the disk; may be given several times",
    )  # fmt: skip
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        start(build(arguments.inside, arguments.python, arguments.share))
        return 0
    with tempfile.TemporaryDirectory(prefix="imprint-image-") as folder:
        alone = ["unshare", "--mount", "--propagation", "private"]
        command = [*alone, sys.executable, *sys.argv, "--inside", folder]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

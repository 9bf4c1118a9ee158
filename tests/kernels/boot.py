"""Boots Debian's own kernels in emulated machines, and runs a part of the tests in each.

    make kernels                           all machines of the table below, an hour or two
    make kernels MACHINES="6.1 arm64-16k"  some of them
    make kernels MACHINES=6.1 ARGS="tests/core/test_estimate.py -k untouched -x" CPUS=1

A machine is a kernel of a Debian package, an initramfs of busybox and the modules for 9p, and the
file system of this machine, read-only, or, for aarch64, one that is made here of Debian packages,
wheels, and modules that are compiled across. Everything is below build/kernels and is made once;
remove a folder there to have it made anew. What a machine said is in build/kernels/results.

It takes the Debian packages qemu-system-x86 or qemu-system-arm; for aarch64 also debootstrap,
gcc-aarch64-linux-gnu and libc6-dev-arm64-cross, and Debian 12's Python.
"""

import gzip
import json
import lzma
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "kernels"
RESULTS = WORK / "results"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Of the suite whose file system the machines have.
SUITE = "bookworm"
PYTHON = "3.11"


@dataclass(frozen=True)
class Machine:
    name: str
    suite: str
    architecture: str
    package: str  # depends on the suite's present kernel

    @property
    def out(self) -> Path:
        return RESULTS / self.name


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("5.10", "bullseye", "amd64", "linux-image-amd64"),
        Machine("6.1", "bookworm", "amd64", "linux-image-amd64"),
        Machine("6.12", "trixie", "amd64", "linux-image-amd64"),
        Machine("newest", "sid", "amd64", "linux-image-amd64"),
        Machine("arm64-4k", "trixie", "arm64", "linux-image-arm64"),
        Machine("arm64-16k", "trixie", "arm64", "linux-image-arm64-16k"),
    )
}

# What depends on the kernel, and not for hours.
TESTS = """
    tests/passes tests/guard tests/kernel tests/processes tests/arrays/test_allocator.py
    tests/arrays/test_idle_memory.py tests/core/test_altered.py tests/core/test_copy.py
    tests/core/test_late_advice.py tests/core/test_moved.py tests/core/test_places.py
""".split()

# In the order in which they need each other; which of them are modules depends on the kernel.
MODULES = """
    virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci
    netfs fscache 9pnet 9pnet_virtio 9p
""".split()
IN_KERNELS = rf"/vmlinuz(-[^/]*)?|/({'|'.join(MODULES)})\.ko(\.xz)?"

# What aarch64's file system has.
PACKAGES = "python3", f"libpython{PYTHON}-dev", "gcc"
WHEELS = "numpy pytest hypothesis click rich tqdm prometheus-client pytest-benchmark mmh3".split()

EMULATORS = {
    "amd64": "qemu-system-x86_64 -machine q35 -cpu max",
    "arm64": "qemu-system-aarch64 -machine virt -cpu max,pauth-impdef=on",
}
CONSOLES = {"amd64": "ttyS0", "arm64": "ttyAMA0"}
COMMON = "-accel tcg,thread=multi -m 3G -display none -monitor none -no-reboot -nic none"
CPUS = os.environ.get("CPUS", "2")
TIMEOUT_SECONDS = 3 * 3600

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
options=trans=virtio,version=9p2000.L,msize=262144
mount -t 9p -o $options,cache=loose,ro root /root
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts pts /root/dev/pts
for place in dev/shm run tmp; do mount -t tmpfs -o mode=1777 tmp /root/$place; done
mount -t 9p -o $options out /root/mnt
ifconfig lo 127.0.0.1 up
chroot /root /bin/sh /mnt/run.sh >/root/mnt/log.txt 2>&1 </dev/null
sync
poweroff -f
"""

# Before the tests: what kind of machine it was.
TELL = """
import json, mmap, platform, ksmcore
found = {"kernel": platform.release(), "page": mmap.PAGESIZE, "features": ksmcore.features()}
json.dump(found, open("/mnt/machine.json", "w"))
"""


def run(*command: object, **how: object) -> str:
    """What a command writes."""
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE, **how).stdout


# ---- packages --------------------------------------------------------------------------------


def mirror() -> str:
    """Where this machine has its Debian packages from."""
    told = "$(REPO_URI) $(ORIGIN) $(LABEL)"
    for line in run("apt-get", "indextargets", "--format", told).splitlines():
        uri, *whose = line.split()
        if whose == ["Debian", "Debian"]:
            return uri
    raise SystemExit("apt knows no Debian packages: apt-get update?")


def apt(suite: str, architecture: str, *command: str, cwd: Path = WORK) -> str:
    """Runs apt-get or apt-cache with lists of another suite, apart from those of the system."""
    place = WORK / "apt" / f"{suite}-{architecture}"
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "root",
        "Dir::Etc::SourceList": place / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": place / "lists",
        "Dir::State::Status": place / "status",
        "Dir::Cache": place / "cache",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    if not (place / "status").exists():
        for folder in ("lists/partial", "cache/archives/partial"):
            (place / folder).mkdir(parents=True, exist_ok=True)
        source = f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n"
        (place / "sources.list").write_text(source)
        run("apt-get", *options, "--quiet", "update")
        (place / "status").touch()
    name, *rest = command
    return run(name, *options, "--quiet", *rest, cwd=cwd)


def needed(suite: str, architecture: str, package: str) -> list[str]:
    """The package, and those of its dependencies that make up a kernel."""
    shown = apt(suite, architecture, "apt-cache", "show", "--no-all-versions", package)
    depends = re.search(r"^Depends: (.*)$", shown, re.MULTILINE)
    names = re.findall(r"\blinux-(?:image|binary|modules)-\S+", depends[1] if depends else "")
    return [package, *(name for other in names for name in needed(suite, architecture, other))]


def take(suite: str, architecture: str, package: str, wanted: str, into: Path) -> None:
    """Puts the files of a package whose paths end so into a folder, flat."""
    apt(suite, architecture, "apt-get", "download", package, cwd=into)
    for deb in into.glob("*.deb"):
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as data,
            tarfile.open(fileobj=data.stdout, mode="r|") as files,
        ):
            for member in files:
                if member.isfile() and re.search(rf"({wanted})$", member.name):
                    data = files.extractfile(member).read()
                    (into / Path(member.name).name).write_bytes(data)
        deb.unlink()


# ---- kernel and initramfs --------------------------------------------------------------------


def unpacked(image: bytes) -> bytes:
    """A kernel of aarch64 as qemu takes it: not as an EFI program that unpacks itself."""
    if image[4:8] != b"zimg":
        return image
    begin, size = (int.from_bytes(image[at : at + 4], "little") for at in (8, 12))
    return gzip.decompress(image[begin : begin + size])


def kernel(machine: Machine) -> Path:
    """A folder with the machine's kernel and the modules that it begins with."""
    place = WORK / "kernels" / machine.name
    if not (place / "kernel").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        where = machine.suite, machine.architecture
        for package in needed(*where, machine.package):
            print(f"{machine.name}: {package}", flush=True)
            take(*where, package, IN_KERNELS, place)
        (image,) = place.glob("vmlinuz*")
        (place / "kernel").write_bytes(unpacked(image.read_bytes()))
        image.unlink()
    return place


def busybox(architecture: str) -> bytes:
    place = WORK / "busybox" / architecture
    if not (place / "busybox").exists():
        place.mkdir(parents=True, exist_ok=True)
        take(SUITE, architecture, "busybox-static", "bin/busybox", place)
    return (place / "busybox").read_bytes()


def module(place: Path, name: str) -> bytes | None:
    for found in place.glob(f"{name}.ko*"):
        data = found.read_bytes()
        return lzma.decompress(data) if found.suffix == ".xz" else data
    return None


def entry(name: str, mode: int, data: bytes = b"") -> bytes:
    """A file of an archive of cpio's format "newc"."""
    path = name.encode() + b"\0"
    numbers = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0]
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + path
    return b"".join(part + bytes(-len(part) % 4) for part in (head, data))


def initramfs(machine: Machine) -> Path:
    place = kernel(machine)
    executable = stat.S_IFREG | 0o755
    parts = [entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "modules", "root")]
    parts += [
        entry("bin/busybox", executable, busybox(machine.architecture)),
        entry("init", executable, INIT.encode()),
    ]
    for n, name in enumerate(MODULES):
        data = module(place, name)
        if data is not None:
            parts.append(entry(f"modules/{n:02}-{name}.ko", stat.S_IFREG | 0o644, data))
    made = place / "initramfs"
    made.write_bytes(b"".join([*parts, entry("TRAILER!!!", 0)]))
    return made


# ---- the file system -------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where things are in a machine's file system."""

    tree: Path  # outside
    project: Path
    python: Path
    path: str = ""  # PYTHONPATH


def of_this_machine() -> Place:
    return Place(Path("/"), ROOT, Path(sys.executable))


def of_arm64() -> Place:
    """A file system for aarch64, with the present modules and tests in it."""
    tree = WORK / "arm64"
    ready = tree / "ready"
    if not ready.exists():
        shutil.rmtree(tree, ignore_errors=True)
        print("arm64: the file system", flush=True)
        unpack_suite(tree)
        platforms = ("manylinux2014_aarch64", "manylinux_2_28_aarch64")
        run(
            *(sys.executable, "-m", "pip", "install", "--quiet", "--target", tree / "wheels"),
            *("--implementation", "cp", "--python-version", PYTHON, "--only-binary=:all:"),
            *(f"--platform={platform}" for platform in platforms),
            *WHEELS,
        )
        for told in Path(sysconfig.get_path("purelib")).glob("ksmcore-*.dist-info"):
            shutil.copytree(told, tree / "wheels" / told.name)
        ready.touch()
    project = tree / "project"
    compile_across(tree, project)
    shutil.rmtree(project / "tests", ignore_errors=True)
    shutil.copytree(ROOT / "tests", project / "tests", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", project)
    return Place(tree, Path("/project"), Path("/usr/bin/python3"), "/project:/wheels")


def unpack_suite(tree: Path) -> None:
    """Debian as far as unpacking goes: none of its scripts can run here."""
    run(
        *("debootstrap", "--arch=arm64", "--foreign", "--variant=minbase"),
        *(f"--include={','.join(PACKAGES)}", SUITE, tree, mirror()),
    )
    for deb in sorted(tree.glob("var/cache/apt/archives/*.deb")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as data:
            run("tar", "-x", "-C", tree, "--keep-directory-symlink", stdin=data.stdout)
        deb.unlink()
    (tree / "mnt").mkdir(exist_ok=True)
    # In a container debootstrap makes it a link to the one outside.
    if (tree / "proc").is_symlink():
        (tree / "proc").unlink()
    (tree / "proc").mkdir(exist_ok=True)
    for name in ("passwd", "group"):
        shutil.copy(tree / f"usr/share/base-passwd/{name}.master", tree / "etc" / name)


def compile_across(tree: Path, project: Path) -> None:
    """Compiles the modules for aarch64, those that changed, by what its Python was built with."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" != PYTHON:
        raise SystemExit(f"modules for aarch64 take Python {PYTHON}, that of {SUITE}")
    print("arm64: the modules", flush=True)
    name = "_sysconfigdata__aarch64-linux-gnu"
    config = WORK / "arm64-config"
    config.mkdir(exist_ok=True)
    shutil.copy(tree / f"usr/lib/python{PYTHON}/{name}.py", config)
    environment = {
        **os.environ,
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "_PYTHON_SYSCONFIGDATA_NAME": name,
        "PYTHONPATH": str(config),
        "CFLAGS": f"-I{tree}/usr/include/python{PYTHON} -I{tree}/usr/include",
        "KSMCORE_TESTING": "1",
    }
    build = ("--build-base", WORK / "arm64-build", "--build-lib", project)
    run(sys.executable, "setup.py", "--quiet", "build", *build, cwd=ROOT, env=environment)


# ---- machines --------------------------------------------------------------------------------


def boot(machine: Machine, args: list[str]) -> None:
    """Runs the tests in a machine; what comes of it is in its folder of results."""
    place = kernel(machine)
    archive = initramfs(machine)
    where = of_arm64() if machine.architecture == "arm64" else of_this_machine()
    python = shlex.quote(str(where.python))
    shutil.rmtree(machine.out, ignore_errors=True)
    machine.out.mkdir(parents=True)
    tests = [
        *(args or TESTS),
        "-v",
        "--durations=15",
        "-p",
        "no:cacheprovider",
        "--junitxml=/mnt/results.xml",
    ]
    script = f"""
        export HOME=/tmp PATH=/usr/bin:/bin:/usr/sbin:/sbin PYTHONDONTWRITEBYTECODE=1
        export HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
        export PYTHONPATH={shlex.quote(where.path)}
        cd {shlex.quote(str(where.project))}
        {python} -c {shlex.quote(TELL)}
        {python} -m pytest {shlex.join(tests)}
    """
    (machine.out / "run.sh").write_text(script)
    command = [
        *EMULATORS[machine.architecture].split(),
        *COMMON.split(),
        *("-smp", CPUS),
        *("-kernel", place / "kernel", "-initrd", archive),
        *("-append", f"console={CONSOLES[machine.architecture]} quiet panic=-1 mitigations=off"),
        *("-serial", f"file:{machine.out / 'console.txt'}"),
    ]
    for tag, path, more in (("root", where.tree, ",readonly=on"), ("out", machine.out, "")):
        share = f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap{more}"
        command += ["-virtfs", share]
    print(f"{machine.name}: see {machine.out / 'log.txt'}", flush=True)
    try:
        subprocess.run([str(word) for word in command], check=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{machine.name}: ended after {TIMEOUT_SECONDS} s", flush=True)


GUARDS = ("userfaultfd", "userfaultfd-user", "mprotect")


def counts(log: str) -> dict[str, int]:
    """How many tests passed, failed and were skipped; also of a run that did not end."""
    words = re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]$", log, re.MULTILINE)
    failed = words.count("FAILED") + words.count("ERROR")
    return {
        "passed": words.count("PASSED"),
        "failed": failed,
        "skipped": words.count("SKIPPED"),
        "not run": int(re.search(r"(\d+) (?:selected|items?)$", log, re.MULTILINE)[1]) - len(words),
    }


def row(machine: Machine) -> str:
    """A machine's results as a row of the table."""
    try:
        told = json.loads((machine.out / "machine.json").read_text())
        found = counts((machine.out / "log.txt").read_text(errors="replace"))
    except (OSError, ValueError, TypeError):
        return f"| {machine.name}: no result, see {machine.out.relative_to(ROOT)} |"
    there = [name for name, why_not in told["features"].items() if why_not is None]
    guards = ", ".join(f"`{name}`" for name in GUARDS if name in there)
    trackers = ", ".join(["`pagemap`"] * ("tracking" in there) + ["`checksum`"])
    what = f"{told['kernel']} | {told['page'] // 1024} KiB | {guards} | {trackers}"
    return f"| {what} | {' | '.join(map(str, found.values()))} |"


def main(args: list[str]) -> int:
    names = [arg for arg in args if arg in MACHINES]
    rest = [arg for arg in args if arg not in MACHINES]
    machines = [MACHINES[name] for name in names] or list(MACHINES.values())
    WORK.mkdir(parents=True, exist_ok=True)
    for machine in machines:
        boot(machine, rest)
    print("| kernel | page | guards | trackers | passed | failed | skipped | not run |")
    print("|---|---|---|---|---|---|---|---|")
    rows = [row(machine) for machine in machines]
    print(*rows, sep="\n")
    return 0 if all(re.search(r"\| 0 \| \d+ \| 0 \|$", line) for line in rows) else 1


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))

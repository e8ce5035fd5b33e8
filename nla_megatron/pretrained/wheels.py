"""Wheels from the Python index that pip is configured to ask, each of which has the checksum that is known of it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from nla_megatron.disk import room_on
from nla_megatron.errors import DamagedPackage, DiskFull, IndexUnreachable, NlaError, RunDirectoryError
from nla_megatron.pretrained.catalogue import Package

_NETWORK = re.compile(
    r"Retrying \(Retry|Max retries|ConnectionError|ConnectTimeout|ReadTimeout|timed? ?out|Could not fetch URL"
    r"|ProxyError|SSLError|Connection (?:broken|aborted|reset|refused)|IncompleteRead|getaddrinfo|Name or service"
    r"|ProtocolError|HTTPError|HTTP error|Client Error|Server Error",
    re.IGNORECASE,
)  # fmt: skip
_DAMAGED = ("DO NOT MATCH THE HASHES", "has an invalid wheel", "BadZipFile", "is invalid")
_FULL = ("No space left on device", "[Errno 28]", "Disk quota exceeded", "[Errno 122]", "File too large", "[Errno 27]")
_FORBIDDEN = ("Permission denied", "[Errno 13]", "Read-only file system", "[Errno 30]", "Operation not permitted")
_REACH = (
    "check the network, and what pip is told of the index (`pip config list`, PIP_INDEX_URL, PIP_PROXY, PIP_CERT); "
    "where there is none, download the package elsewhere and set PIP_FIND_LINKS to its directory"
)
_ABSENT = "No matching distribution"


def wheel(package: Package, folder: Path, seconds: float) -> Path:
    """The package's wheel in `folder`: the one that lies there if it is whole, else downloaded, whole or not at all.

    Args:
        seconds: how long pip may take.

    Raises:
        IndexUnreachable: no index answers, or it has no such package.
        DamagedPackage: what the index sent is not what it said that it would send.
        DiskFull, RunDirectoryError: the disk refuses.
    """
    for held in folder.glob("*.whl"):
        if _is(held, package):
            if _checksum(held) == package.sha256:
                return held
            print(f"note: {held} is not whole; it is downloaded again", file=sys.stderr, flush=True)
            held.unlink()
    with room_on(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as temporary:
        place = Path(temporary)
        (place / "wanted.txt").write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        _pip(package, place, seconds)
        found = next((path for path in place.glob("*.whl") if _is(path, package)), None)
        if found is None or _checksum(found) != package.sha256:
            raise _damaged(package, f"{found.name if found else 'no wheel'} with another checksum")
        return found.replace(folder / found.name)


def _is(path: Path, package: Package) -> bool:
    name, version = path.name.split("-")[:2]
    return name == package.name.replace("-", "_") and version == package.version


def _pip(package: Package, place: Path, seconds: float) -> None:
    """`pip download` as the user has configured it; what it cannot do is named."""
    command = [
        # Less of it, and pip keeps to itself why an index did not answer.
        *(sys.executable, "-m", "pip", "download", "-vv", "--progress-bar", "off", "--no-input", "--no-deps"),
        *("--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes", "--dest", str(place)),
        *("-r", str(place / "wanted.txt")),
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise IndexUnreachable(
            f"no {package.requirement} from pip within {seconds:.0f} s", "an index that answers", _REACH
        ) from None
    if done.returncode:
        raise _refusal(package, place, done.stdout + done.stderr)


def _refusal(package: Package, place: Path, told: str) -> NlaError:
    """What pip has said, as a named error."""
    last = _last_words(told)
    if "No module named pip" in told:
        return IndexUnreachable(f"no pip beside {sys.executable}", "pip, which downloads", "python -m ensurepip")
    if any(word in told for word in _FULL):
        return DiskFull(
            f"pip: {last}", f"room for {package.requirement} in {place.parent} and where temporary files go",
            "make room and repeat the command",
        )  # fmt: skip
    if any(word in told for word in _FORBIDDEN):
        return RunDirectoryError(f"pip: {last}", f"a place that may be written to: {place.parent}", "choose another")
    if any(word in told for word in _DAMAGED):
        return _damaged(package, _checksums(told) or last)
    if _NETWORK.search(told):
        return IndexUnreachable(f"no {package.requirement}: {_reason(told)}", "an index that can be reached", _REACH)
    if _ABSENT in told:
        return IndexUnreachable(
            f"no {package.requirement}: {last}", "an index that has the package", _REACH
        )  # fmt: skip
    return IndexUnreachable(f"no {package.requirement}: pip ended with {last}", "a wheel", _REACH)


def _damaged(package: Package, found: str) -> DamagedPackage:
    return DamagedPackage(
        f"{package.requirement} from the index: {found}", f"a wheel with sha256 {package.sha256}",
        "repeat the command; if it stays, ask another index (PIP_INDEX_URL), or clear pip's cache (`pip cache purge`)",
    )  # fmt: skip


def _last_words(told: str) -> str:
    lines = [line.strip() for line in told.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["nothing said"])[-1].removeprefix("ERROR: ")[:300]


def _reason(told: str) -> str:
    """The line that names the failure of the network; the last one only says that nothing was found."""
    lines = [line.strip() for line in told.splitlines() if _NETWORK.search(line)]
    # Of several indexes most only have no such page.
    lines = [line for line in lines if "404" not in line] or lines
    return re.sub(r"^(?:WARNING|ERROR): |<[^>]* object at 0x[0-9a-f]+>: ", "", lines[-1])[:400]


def _checksums(told: str) -> str:
    found = re.search(r"Got\s+([0-9a-f]{64})", told)
    return f"a file with sha256 {found[1]}" if found else ""


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

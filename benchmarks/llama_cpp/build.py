"""Fetch and build llama.cpp, the peer, from the source distribution of llama-cpp-python.

The source distribution is fixed by version and SHA-256, so every build starts from the same
bytes. One substitution is made in the unpacked source, see `AMX_CALL`.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from common import BenchmarkError, default_dir, progress, run, run_main

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SDIST = f"llama_cpp_python-{VERSION}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

# GCC 12 declares 8 of the 64 bytes that ldtilecfg reads (`"m" (*((const void **)__config))` in
# amxtileintrin.h), so it drops the stores to the other 56 as dead and every batch above 1 crashes
# or computes nonsense. The barrier makes the whole object visible to the instruction; where the
# compiler is right about the 64 bytes it costs nothing.
AMX_SOURCE = Path("ggml/src/ggml-cpu/amx/mmq.cpp")
AMX_CALL = "_tile_loadconfig(&tc);"
AMX_BARRIER = 'asm volatile("" :: "r"(&tc) : "memory");'

TARGETS = ("llama-bench", "llama-batched-bench", "llama-quantize")
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_OPENMP=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_NUMBER=0",
)
# What each variant may use: everything this processor has, or what most small processors have.
VARIANTS = {
    "native": ("-DGGML_NATIVE=ON",),
    "avx2": (
        "-DGGML_NATIVE=OFF",
        "-DGGML_AVX2=ON",
        "-DGGML_FMA=ON",
        "-DGGML_F16C=ON",
        "-DGGML_BMI2=ON",
        "-DGGML_AVX512=OFF",
    ),
}
DOWNLOAD_TIMEOUT_S = 900
BUILD_TIMEOUT_S = 3 * 3600


@dataclass(frozen=True, slots=True)
class Peer:
    """A built llama.cpp.

    Attributes:
        package: distribution and version the source came from.
        commit: llama.cpp's own commit, from that distribution's changelog.
        compiler: first line of `c++ --version`.
        options: what cmake was told.
        bin_dir: folder of the programs.
    """

    package: str
    commit: str
    compiler: str
    options: tuple[str, ...]
    bin_dir: Path

    def program(self, name: str) -> Path:
        """Return the path of one of `TARGETS`."""
        return self.bin_dir / name


def download(directory: Path) -> Path:
    """Bring the source distribution into `directory`, or reuse it, and check its SHA-256."""
    archive = directory / SDIST
    if not archive.exists():
        progress(f"downloading {PACKAGE} {VERSION}")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        run(
            [*pip, "--no-binary", PACKAGE, "--dest", directory, f"{PACKAGE}=={VERSION}"],
            timeout_s=DOWNLOAD_TIMEOUT_S,
        )
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SDIST_SHA256:
        raise BenchmarkError(
            f"{archive} has SHA-256 {digest} but {SDIST_SHA256} is expected; delete it and run again"
        )
    return archive


def patch_amx(source: Path) -> None:
    """Put the compiler barrier before the one AMX configuration load, see `AMX_CALL`."""
    path = source / AMX_SOURCE
    text = path.read_text(encoding="utf-8")
    found = text.count(AMX_CALL)
    if found != 1:
        raise BenchmarkError(
            f"{AMX_SOURCE} calls {AMX_CALL} {found} times where 1 is expected; "
            f"this script knows only {PACKAGE} {VERSION}"
        )
    path.write_text(text.replace(AMX_CALL, f"{AMX_BARRIER}\n    {AMX_CALL}"), encoding="utf-8")


def unpack(archive: Path, source: Path) -> str:
    """Replace `source` by the patched llama.cpp of `archive`.

    Args:
        archive: the source distribution.
        source: folder to write; appears complete or not at all.

    Returns:
        The llama.cpp commit named in the distribution's changelog.
    """
    progress(f"unpacking {archive.name}")
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        (top,) = Path(scratch).iterdir()
        changelog = (top / "CHANGELOG.md").read_text(encoding="utf-8")
        llama_cpp = top / "vendor" / "llama.cpp"
        patch_amx(llama_cpp)
        shutil.rmtree(source, ignore_errors=True)
        llama_cpp.rename(source)
    section = changelog.partition(f"## [{VERSION}]")[2].partition("\n## [")[0]
    named = re.search(r"llama\.cpp@([0-9a-f]{7,40})", section)
    return named.group(1) if named else "unknown"


def compile_peer(source: Path, build: Path, options: tuple[str, ...], jobs: int) -> None:
    """Configure and compile `TARGETS` of `source` in `build` with `jobs` compilers at a time."""
    progress(f"configuring in {build}")
    configure: list[str | Path] = ["cmake", "-S", source, "-B", build, *options]
    run(configure, timeout_s=BUILD_TIMEOUT_S)
    progress(f"compiling {', '.join(TARGETS)} with {jobs} jobs; this takes minutes")
    make: list[str | Path] = ["cmake", "--build", build, "--config", "Release", "--parallel", str(jobs)]
    run([*make, "--target", *TARGETS], timeout_s=BUILD_TIMEOUT_S)


def read_stamp(stamp: Path) -> Peer | None:
    """Return the peer that an earlier build recorded, None if there is none to use."""
    try:
        fields = json.loads(stamp.read_text(encoding="utf-8"))
        fields["options"] = tuple(fields["options"])
        peer = Peer(**{**fields, "bin_dir": stamp.parent / fields["bin_dir"]})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return peer if all(peer.program(name).is_file() for name in TARGETS) else None


def write_stamp(stamp: Path, peer: Peer) -> None:
    """Record `peer`; written last, so its presence means that the build is whole."""
    fields = {**asdict(peer), "bin_dir": str(peer.bin_dir.relative_to(stamp.parent))}
    stamp.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def ensure_peer(directory: Path, *, jobs: int, variant: str = "native") -> Peer:
    """Return the built peer, building it first where that has not been done.

    Args:
        directory: cache folder; `llama.cpp/` is created in it.
        jobs: compilers to run at a time.
        variant: name among `VARIANTS`.

    Raises:
        BenchmarkError: a download, check or compilation failed.
    """
    root = directory / "llama.cpp"
    stamp = root / f"{variant}.json"
    wanted = (*CMAKE_OPTIONS, *VARIANTS[variant])
    compiler = run([os.environ.get("CXX", "c++"), "--version"], timeout_s=60).splitlines()[0]
    known = read_stamp(stamp)
    package = f"{PACKAGE} {VERSION}"
    recorded = known and (known.package, known.compiler, known.options[: len(wanted)])
    if known and recorded == (package, compiler, wanted):
        progress(f"llama.cpp {known.commit} is built in {known.bin_dir}")
        return known
    root.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    source, build = root / "source", root / f"build-{variant}"
    shutil.rmtree(build, ignore_errors=True)
    commit = unpack(download(root), source)
    # Without the commit given, llama.cpp asks git and may report a repository around the cache.
    options = (*wanted, f"-DLLAMA_BUILD_COMMIT={commit}")
    compile_peer(source, build, options, jobs)
    peer = Peer(package, commit, compiler, options, build / "bin")
    write_stamp(stamp, peer)
    return peer


def main() -> None:
    """Build the peer and print the folder of its programs."""
    parser = argparse.ArgumentParser(description="Build llama.cpp, the peer of the comparison.")
    parser.add_argument("--dir", type=Path, default=default_dir(), help="cache folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--variant", choices=VARIANTS, default="native", help="instruction sets it may use")
    args = parser.parse_args()
    if args.jobs < 1:
        raise BenchmarkError(f"--jobs is {args.jobs}; it must be at least 1")
    print(ensure_peer(args.dir.expanduser().resolve(), jobs=args.jobs, variant=args.variant).bin_dir)


if __name__ == "__main__":
    run_main(main)

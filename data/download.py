"""Fetch the real data: LFW (13,233 photographs of 5,749 people) for module M27, CIFAR-10 for modules M28 and M29.

    python data/download.py lfw                             into data/lfw/<Name>/<Name>_0001.jpg
    python data/download.py cifar10                         into data/cifar10/cifar-10-batches-py, as torchvision reads it
    python data/download.py lfw -from ~/Downloads/lfw.tgz   without network: an archive at hand, which stays as it is
    python data/download.py lfw -from https://example.org/lfw.tgz -sha256 <64 digits>
    python data/download.py lfw -force                      replace what is there

A data set appears as a whole or not at all: an interrupted download goes on where it stopped, its SHA-256 is checked before it is
used, it is unpacked beside its place and then moved there. LFW comes from the mirrors that scikit-learn keeps, since its own site
is gone. Every exercise runs without any download too, on sample data that it draws itself. The
environment variable COURSE_DATA puts the data elsewhere.
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import new_parser, parse
from data.fetch import UNKNOWN, Source, download, sha256_of, size_of
from errors import InputError
from paths import DATA, ROOT, check_writable, display_path


@dataclass(frozen=True)
class Dataset:
    pattern: str  # of its files, relative to data/<name>
    count: int  # files of that pattern in the full set
    sources: tuple[Source, ...]  # tried in this order
    next_command: tuple[str, ...]  # script, then the flag that takes the folder


FIGSHARE = ("https://ndownloader.figshare.com/files", "https://figshare.com/ndownloader/files")
LFW = {  # number at figshare -> SHA-256
    5976015: "b47c8422c8cded889dc5a13418c4bc2abbda121092b3533a83306f90d900100a",  # lfw-funneled.tgz, faces aligned
    5976018: "055f7d9c632d7370e6fb4afc7468d40f970c34a80d4c6f50ffec63f5a8d536c0",  # lfw.tgz
}
LFW_SOURCES = tuple(Source(f"{home}/{number}", sha256) for number, sha256 in LFW.items() for home in FIGSHARE)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"  # 170,498,071 bytes
CIFAR10_SOURCES = (Source(CIFAR10_URL, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),)
DATASETS = {
    "lfw": Dataset("*/*.jpg", 13_233, LFW_SOURCES, ("m27_data_loading/lfw_dataset.py", "-path_to_folder")),
    "cifar10": Dataset("cifar-10-batches-py/*batch*", 7, CIFAR10_SOURCES, ("m28_distributed_training/dp_train.py",)),
}

# ---- archive -> folder -----------------------------------------------------------------------------------------------


def at_hand(source: str) -> Path:
    """The archive that -from names; raises InputError when that is no readable file."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"-from takes an archive, and {path} is a folder: give images that are unpacked already to -path_to_folder")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(f"-from: there is no file {path.absolute()} that could be read")
    return path


def check_foreign(archive: Path, name: str, demanded: str | None) -> None:
    """Print the SHA-256 of an archive given with -from; raises InputError when it is not the demanded one."""
    found = sha256_of(archive)
    if demanded not in (None, found):
        raise InputError(f"the SHA-256 of {archive.name} should be {demanded} but is {found}")
    good = demanded or found in [source.sha256 for source in DATASETS[name].sources]
    print(f"SHA-256 {found}: " + ("as it should be" if good else f"not one of the known archives of {name}, used as it is"))


def unpack(archive: Path, folder: Path) -> None:
    """Extract a tar archive; raises InputError when it is none, is damaged, or holds a member that would land outside `folder`."""
    try:
        reading = {"desc": "unpacking", "total": size_of(archive), "bytes": False, "unit": "B", "unit_scale": True}
        with archive.open("rb") as raw, tqdm.wrapattr(raw, "read", **reading) as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                tar.extract(member, folder, filter="data")
            tar.fileobj.read()  # up to the end, where gzip keeps its checksum
    except tarfile.FilterError as error:
        raise InputError(f"{archive.name} is refused, nothing of it was kept: {error}") from error
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None):  # the disk, not the archive
            raise
        reason = str(error).partition("\n")[0].rstrip(":")  # tarfile lists in more lines what each compression had to say
        raise InputError(f"{archive.name} is not a tar archive, or is damaged: {reason}") from error


def install(archive: Path, name: str, work: Path) -> None:
    """Unpack into `work` and move to data/<name> in one step, without the archive's top folder; raises InputError."""
    unpack(archive, work / "unpacked" / "new")
    pattern = DATASETS[name].pattern
    first = next((work / "unpacked" / "new").rglob(pattern), None)
    if first is None:
        raise InputError(f"{archive.name} holds no file {pattern}, so it is not {name}: nothing was changed")
    old = work / "unpacked" / "old"
    if os.path.lexists(DATA / name):
        (DATA / name).rename(old)
    try:
        first.parents[1].rename(DATA / name)
    except OSError:
        if old.exists():
            old.rename(DATA / name)  # better the old set than none
        raise


def lock(file) -> bool:
    """Hold a file for this process, until it closes the file or ends in any way; False when another process holds it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # another errno: a network disk that knows no locks
        return not isinstance(error, BlockingIOError | PermissionError)
    return True


@contextlib.contextmanager
def work_folder(name: str):
    """Yield data/.<name>.part, for one process at a time: half a download stays in it for the next run, nothing else does."""
    work = DATA / f".{name}.part"
    check_writable(work)
    with (work / "lock").open("w") as lock_file:
        if not lock(lock_file):
            raise InputError(f"another run is fetching {name} at this moment: wait until it has ended")
        tidy(work)  # after a run that was killed
        try:
            yield work
        finally:
            tidy(work)
            for part in work.glob("*.part"):
                print(f"{size_of(part) / 1e6:.1f} MB of the download are kept: the same command goes on from there")
            lock_file.close()  # Windows removes no open file
            (work / "lock").unlink()
            with contextlib.suppress(OSError):
                work.rmdir()  # it stays where half a download lies in it


def tidy(work: Path) -> None:
    shutil.rmtree(work / "unpacked", ignore_errors=True)
    (work / f"{UNKNOWN}.part").unlink(missing_ok=True)  # without a checksum nobody knows what it is half of


# ---- what the user asked for -----------------------------------------------------------------------------------------


def archive_for(args: argparse.Namespace, work: Path) -> Path:
    """The archive to unpack, from the mirrors or from where -from says; raises InputError."""
    if args.source is None:
        archive = download(DATASETS[args.name].sources, work)
        print("SHA-256: as it should be")  # download gives nothing else
        return archive
    remote = re.match("https?://", args.source)
    archive = download((Source(args.source, args.sha256),), work) if remote else at_hand(args.source)
    check_foreign(archive, args.name, args.sha256)
    return archive


def main(args: argparse.Namespace) -> list[Path]:
    """Bring data/<name> into place unless it is there; returns its files, raises InputError."""
    dataset, target = DATASETS[args.name], DATA / args.name
    files = list(target.glob(dataset.pattern))
    if len(files) >= dataset.count and not args.force:
        print("already there and complete, nothing to do; -force fetches it anew")
        return files
    if not args.force and (any(target.glob("*")) or target.is_file()):
        raise InputError(f"{target} holds {len(files):,} of the {dataset.count:,} files of {args.name}: -force replaces the folder")
    with work_folder(args.name) as work:
        install(archive_for(args, work), args.name, work)
        for part in work.glob("*.part"):
            part.unlink()
    return list(target.glob(dataset.pattern))


if __name__ == "__main__":
    parser = new_parser(__doc__, computes=False)
    parser.add_argument("name", metavar="lfw|cifar10", choices=DATASETS, help="the data set to fetch")
    parser.add_argument("-from", dest="source", metavar="FILE_OR_URL", help="take this archive instead of the mirrors'")
    parser.add_argument("-sha256", type=str.lower, help="the checksum that the archive of -from must have")
    parser.add_argument("-force", action="store_true", help="fetch again what is there and replace it")
    args = parse(parser)
    if args.sha256 and not args.source:
        parser.error("argument -sha256: goes with -from; the checksums of the mirrors are known")
    files = main(args)
    dataset, folder = DATASETS[args.name], display_path(DATA / args.name)
    script, *flags = dataset.next_command
    people = f" of {len({file.parent for file in files}):,} people" if args.name == "lfw" else ""
    print(f"{folder}: {len(files):,} {'images' if people else 'files'}{people} (the full set has {dataset.count:,})")
    if (ROOT / script).exists():
        print("next:", "python", display_path(ROOT / script), *flags, *([folder] if flags else []))

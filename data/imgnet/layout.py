"""Find the images that the CSVs name, loose or in zips, in the layouts that people have."""

import filecmp
import os
import unicodedata
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

from PIL import Image

DAMAGE = (  # what reading an image raises
    EOFError, OSError, RuntimeError, SyntaxError, ValueError,
    Image.DecompressionBombError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def keys(name):
    """Return the keys of a picture: its name, its name with a normalised suffix, the last part of that."""
    name = unicodedata.normalize("NFC", name)  # macOS gives NFD
    stem, dot, suffix = name.rpartition(".")
    suffix = suffix.lower().replace("jpeg", "jpg")
    return name, ("path", f"{stem}{dot}{suffix}"), ("last", f"{stem.rpartition('/')[2]}{dot}{suffix}")


def walk(folder):
    """Yield the files below `folder`; follow links to folders, but not to a folder that contains them."""
    for root, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(root) + os.sep
        real = {name: os.path.realpath(f"{root}/{name}") + os.sep for name in sorted(folders)}
        folders[:] = [name for name in real if not here.startswith(real[name])]
        for name in sorted(names):
            if os.path.isfile(f"{root}/{name}") and not name.startswith("._"):
                yield Path(root, name)


def find_images(source):
    """Return the images, {key: (zip file or None, path)}, and the problems met, such as damaged zips.

    Reads `source`/images/ and every zip in `source`; the part of a zip's paths up to a folder `images/` does
    not count. A loose file replaces a zipped one. The keys come from `keys`; if two different loose files, or
    two zipped ones, share a key, its value is a string that names both. If there is an `images/` elsewhere,
    the files of a zip without one have their whole paths as the only key: they may be masks.
    """
    loose, zipped, entries, problems = {}, {}, {}, []
    archives = sorted(path for path in source.iterdir() if path.suffix.lower() == ".zip")
    for archive in (path for path in archives if not path.name.startswith("._")):
        try:
            with zipfile.ZipFile(archive) as file:
                for entry in file.infolist():
                    last = entry.filename.rpartition("/")[2]
                    if last and not last.startswith("._") and "__MACOSX" not in entry.filename:
                        place, content = (str(archive), entry.filename), (entry.CRC, entry.file_size)
                        if entries.setdefault(place, content) != content:
                            found = f"two different files named {entry.filename} found"
                            problems.append(f"{archive}: {found}, one expected")
        except DAMAGE as error:
            problems.append(f"{archive}: damaged or truncated zip archive ({error})")

    def add(index, key, place, same):
        other = index.setdefault(key, place)
        if not isinstance(other, str) and other != place and not same(other, place):
            index[key] = " and ".join(": ".join(filter(None, of)) for of in (other, place))

    for path in walk(source / "images"):
        for key in keys(path.relative_to(source / "images").as_posix()):
            add(loose, key, (None, str(path)), lambda one, other: filecmp.cmp(one[1], other[1], False))
    rooted = bool(loose) or any("/images/" in f"/{path}" for _, path in entries)
    for archive, path in entries:
        _, inside, name = f"/{path}".rpartition("/images/")
        for key in keys(name if inside else path)[: 3 if inside or not rooted else 1]:
            add(zipped, key, (archive, path), lambda one, other: entries[one] == entries[other])
    return zipped | loose, problems


def place_images(rows, found):
    """Find {split: [(filename, label)]}: {split: [place, None if missing, or a string naming two files]}.

    A name without a folder is looked for in subfolders, but only if no image lies directly in `images/`:
    otherwise deeper files could be masks.
    """

    def look(filename, count):
        for name in (filename, filename.removeprefix("images/")):
            for key in keys(name)[: count if "/" not in name else 2]:
                if key in found:
                    return found[key]
        return None

    for count in (2, 3):
        places = {split: [look(filename, count) for filename, _ in rows[split]] for split in rows}
        if any(any(jobs) for jobs in places.values()):
            break
    return places


def check_places(source, rows, places, found):
    """List problems in `place_images`' result: missing images, names of two files, files of two names."""
    problems, owner = [], {}
    names = sorted(key for key in found if isinstance(key, str))
    beside = sorted(path.name + "/" * path.is_dir() for path in source.iterdir())
    beside = [name for name in beside if not name.lower().endswith((".csv", ".zip"))]
    beside = [name for name in beside if name != "images/" and name[0] != "."]
    there = "no file found"
    if names:
        place = found[names[0]]
        place = place if isinstance(place, str) else ": ".join(filter(None, place))
        there = f"{len(names)} files found, such as {names[0]} ({place})"
    if beside:
        listed = ", ".join(beside[:4]) + ", ..." * (len(beside) > 4)
        there += f"; not read: {listed}, a folder images/ or a .zip expected"
    for split, jobs in places.items():
        filenames = [filename for filename, _ in rows[split]]
        missing = [filename for filename, place in zip(filenames, jobs) if place is None]
        if missing:
            count = f"{len(missing)} of {len(jobs)} images missing"
            where = f"in {source}/images and the zips beside it"
            problems.append(f"{split}.csv: {count} {where} (the first: {missing[0]})")
        rivals = [(filename, place) for filename, place in zip(filenames, jobs) if isinstance(place, str)]
        if rivals:
            count = f"{len(rivals)} of {len(jobs)} names stand for different files"
            problems.append(f"{split}.csv: {count} (the first: {rivals[0][0]}, {rivals[0][1]}), one expected")
        for filename, place in zip(filenames, jobs):
            first = owner.setdefault(place, filename) if isinstance(place, tuple) else filename
            if first != filename:
                one = ": ".join(filter(None, place))
                problems.append(f"{split}.csv: {filename} and {first} are one file, {one}")
                break
    if any(None in jobs for jobs in places.values()):
        problems.append(f"{source}: {there}")
    return problems


@lru_cache
def open_zip(path, process):
    """Open a zip once for each process: a forked one would share its parent's file position."""
    return zipfile.ZipFile(path)


def load(place):
    """Read an image's file, loose or in a zip."""
    archive, path = place
    return open_zip(archive, os.getpid()).read(path) if archive else Path(path).read_bytes()


def checksum(rows, places):
    """Return a checksum of the images' files and labels in order; None if a file is damaged."""
    found = 0
    try:
        for split, jobs in places.items():
            for (_, label), place in zip(rows[split], jobs):
                found = zlib.crc32(load(place), zlib.crc32(f"{split}, {label}\n".encode(), found))
    except DAMAGE:
        return None
    return found

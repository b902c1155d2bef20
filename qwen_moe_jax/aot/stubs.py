"""Stand-ins for the ROCm libraries that XLA's AMD plugin is linked against.

The plugin holds the whole compiler, and compiling calls nothing in those libraries that it could not do
without; but the dynamic loader refuses a plugin whose libraries are missing. So small libraries with the
same names and symbols are generated, in which every function fails. They are for machines without ROCm:
where there is a real one, it is what must be loaded.
"""

import ctypes
import dataclasses
import mmap
import os
import re
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

from qwen_moe_jax.errors import ToolchainError

# Libraries of glibc and GCC, which every Linux that runs jaxlib has.
_SYSTEM = re.compile(r"(libc|libm|librt|libdl|libpthread|libstdc\+\+|libgcc_s|ld-linux-x86-64)\.so(\.|$)")

# hipErrorNoDevice; to every other library, too, what is not zero is an error.
_FAILURE = 100
# Functions that return the text of an error, which callers print without a look at it.
_TEXT = re.compile(r"(GetErrorString|GetErrorName|get_status_string|status_to_string)$|^ncclGetLastError$")

# Section types, and the one dynamic tag of a needed library and of its search path (System V ABI, chapter 5).
_SHT_DYNAMIC, _SHT_DYNSYM = 6, 11
_SHT_GNU_VERNEED, _SHT_GNU_VERSYM = 0x6FFFFFFE, 0x6FFFFFFF
_DT_NEEDED, _DT_RPATH, _DT_RUNPATH = 1, 15, 29
_WEAK = 2
_X86_64 = 62


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A symbol that a shared object wants from others.

    Attributes:
        name: as the linker writes it.
        version: that it must have, or "".
        library: soname of the library that the version is of, or "".
        weak: whether the object does without it.
    """

    name: str
    version: str
    library: str
    weak: bool


@dataclasses.dataclass(frozen=True)
class SharedObject:
    """What a shared object asks of the dynamic loader.

    Attributes:
        needed: sonames of the libraries, in the loader's order.
        search: folders that the object names for them, `$ORIGIN` put in.
        undefined: symbols.
    """

    needed: tuple[str, ...]
    search: tuple[Path, ...]
    undefined: tuple[Symbol, ...]

    @property
    def foreign(self) -> list[str]:
        """The needed libraries that are not the system's own."""
        return [name for name in self.needed if not _SYSTEM.match(name)]


def read_shared_object(path: Path) -> SharedObject:
    """Reads the dynamic section and symbols of an ELF file.

    Raises:
        ToolchainError: it is not a shared object for x86_64.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Elf(data, path).shared_object()
    except (OSError, ValueError, IndexError, struct.error, KeyError) as error:
        raise ToolchainError(f"{path} is not a whole shared object for x86_64 ({error}).") from None


@dataclasses.dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int
    count: int  # sh_info: entries, in a table of versions


class _Elf:
    """The tables of a 64-bit little-endian ELF file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        machine = struct.unpack_from("<H", data, 18)[0]
        if data[:6] != b"\x7fELF\x02\x01" or machine != _X86_64:
            raise ValueError("its header is another one's")
        self.data, self.path = data, path
        (start,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<HH", data, 58)
        self.sections = [self._section(start + i * size) for i in range(count)]
        self.by_kind = {section.kind: section for section in reversed(self.sections)}
        self.names = self.sections[self.by_kind[_SHT_DYNSYM].link].offset

    def _section(self, at: int) -> _Section:
        _, kind, _, _, offset, size, link, count = struct.unpack_from("<IIQQQQII", self.data, at)
        return _Section(kind, offset, size, link, count)

    def text(self, offset: int) -> str:
        start = self.names + offset
        return self.data[start : self.data.find(b"\0", start)].decode()

    def shared_object(self) -> SharedObject:
        dynamic = self.by_kind[_SHT_DYNAMIC]
        entries = self.data[dynamic.offset : dynamic.offset + dynamic.size]
        needed, search = [], []
        for tag, value in struct.iter_unpack("<QQ", entries):
            if tag == _DT_NEEDED:
                needed.append(self.text(value))
            elif tag in (_DT_RPATH, _DT_RUNPATH):
                text = re.sub(r"\$ORIGIN|\$\{ORIGIN\}", str(self.path.parent), self.text(value))
                search += [Path(folder) for folder in text.split(":") if folder]
        return SharedObject(tuple(needed), tuple(search), tuple(self._undefined()))

    def _undefined(self) -> list[Symbol]:
        table, versions = self.by_kind[_SHT_DYNSYM], self._versions()
        indices = self.by_kind.get(_SHT_GNU_VERSYM)
        found = []
        for i in range(1, table.size // 24):  # entry 0 stands for no symbol
            name, info, _, section = struct.unpack_from("<IBBH", self.data, table.offset + 24 * i)
            if section != 0 or name == 0:
                continue
            index = struct.unpack_from("<H", self.data, indices.offset + 2 * i)[0] if indices else 0
            version, library = versions.get(index & 0x7FFF, ("", ""))
            found.append(Symbol(self.text(name), version, library, info >> 4 == _WEAK))
        return found

    def _versions(self) -> dict[int, tuple[str, str]]:
        """Number in the table of symbol versions -> version and the soname of its library."""
        section = self.by_kind.get(_SHT_GNU_VERNEED)
        found = {}
        at = section.offset if section else 0
        for _ in range(section.count if section else 0):
            _, count, library, first, following = struct.unpack_from("<HHIII", self.data, at)
            entry = at + first
            for _ in range(count):
                _, _, number, version, step = struct.unpack_from("<IHHII", self.data, entry)
                found[number] = self.text(version), self.text(library)
                entry += step
            at += following
        return found


def c_compiler() -> list[str]:
    """The command of the C compiler: $CC, or cc.

    Raises:
        ToolchainError: there is none.
    """
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[0]) is None:
        raise ToolchainError(
            f"No C compiler: {command[0]!r} is not on the PATH. Install gcc or clang, or name one in CC; the "
            "stand-ins for the ROCm libraries are compiled with it."
        )
    return command


def build_stubs(plugin: Path, folder: Path) -> list[str]:
    """Compiles a stand-in for every library of a plugin that is not the system's own.

    Args:
        plugin: the shared object to make loadable.
        folder: where they are put, under their sonames; it is made.

    Returns:
        Their sonames, in the order in which the plugin names them.

    Raises:
        ToolchainError: the plugin is no shared object, or there is no C compiler or it fails.
    """
    wants = read_shared_object(plugin)
    libraries = wants.foreign
    folder.mkdir(parents=True, exist_ok=True)
    versions: dict[str, dict[str, list[str]]] = {library: defaultdict(list) for library in libraries}
    for symbol in wants.undefined:
        if symbol.library in versions:
            versions[symbol.library][symbol.version].append(symbol.name)
    if libraries:
        # The loader looks for a symbol without a version in every library: any one may hold them all.
        versions[libraries[0]][""] += _unversioned(wants)
    command = c_compiler()
    for library in libraries:
        _compile(command, folder / library, versions[library])
    return libraries


def _unversioned(wants: SharedObject) -> list[str]:
    """The symbols without a version that no library of the system has."""
    system = [ctypes.CDLL(name) for name in wants.needed if name not in wants.foreign]
    return [
        symbol.name
        for symbol in wants.undefined
        if not symbol.version and not symbol.weak and not any(hasattr(lib, symbol.name) for lib in system)
    ]


def _compile(command: list[str], path: Path, versions: dict[str, list[str]]) -> None:
    """Compiles one library: version -> names of its symbols, "" for those without."""
    source = "".join(_function(name) for names in versions.values() for name in names)
    script = "".join(
        f"{version} {{ global: {' '.join(f'{name};' for name in names)} }};\n"
        for version, names in versions.items()
        if version
    )
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        arguments = ["-shared", "-fPIC", "-fno-builtin", "-nostdlib", "-w", f"-Wl,-soname,{path.name}"]
        if script:
            (Path(scratch) / "versions").write_text(script, encoding="ascii")
            arguments.append(f"-Wl,--version-script={scratch}/versions")
        arguments += ["-o", str(path), "-x", "c", "-"]
        done = subprocess.run(
            [*command, *arguments], input=source, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        raise ToolchainError(
            f"The C compiler {command[0]!r} could not compile a stand-in for {path.name}: {reason}"
        )


def _function(name: str) -> str:
    """C source of a function that fails, whatever it is given.

    The caller of the x86_64 calling convention cleans up its arguments, so none need be declared.
    """
    if _TEXT.search(name):
        return f'const char *{name}(void) {{ return "there is no ROCm on this machine"; }}\n'
    return f"long {name}(void) {{ return {_FAILURE}; }}\n"

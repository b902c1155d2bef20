"""The compiler for AMD GPUs: the real one, and a few lines that are linked against the same libraries."""

import re
import subprocess
import zipfile
from pathlib import Path

import jax
import pytest

from qwen_moe_jax.aot import toolchain
from qwen_moe_jax.aot.stubs import c_compiler
from qwen_moe_jax.kernels.table import Kernels

HIP = "libamdhip64.so.7"  # its symbols have versions
RCCL = "librccl.so.1"  # these have none
CXX = "libstdc++.so.6"  # a library of the system, and one that Python does without

_LIBRARIES = {
    HIP: "int hipInit(unsigned flags) { return 0; } int hipFree(void *p) { return 0; }",
    RCCL: """int ncclGetVersion(int *version) { *version = 7; return 0; }
             const char *ncclGetErrorString(int status) { return "real"; }""",
    CXX: "void *__cxa_demangle(void) { return 0; }",
}
_VERSIONS = {HIP: "hip_4.2 { global: hipInit; }; hip_6.0 { global: hipFree; };"}

# What jax asks a plugin for is a table of functions, of which the sizes and the version are read first.
_PLUGIN = """
    #include <stddef.h>
    static size_t table[1000];
    void *GetPjrtApi(void) {
        table[0] = sizeof(table);
        table[2] = 24;
        ((int *)table)[9] = 100;
        return table;
    }
    extern int hipInit(unsigned), hipFree(void *), ncclGetVersion(int *);
    extern const char *ncclGetErrorString(int);
    extern char *__cxa_demangle(const char *, char *, size_t *, int *);
    extern __attribute__((weak)) int optional(void);
    int call_init(void) { return hipInit(0); }
    int call_free(void) { return hipFree(0); }
    int call_version(void) { int version = 0; return ncclGetVersion(&version); }
    const char *call_text(void) { return ncclGetErrorString(1); }
    int call_system(void) {
        int status = 1;
        return __cxa_demangle("i", 0, 0, &status) != 0 && status == 0;
    }
    int has_optional(void) { return optional != 0; }
"""


@pytest.fixture(scope="session")
def rocm() -> None:
    """The real compiler, loaded. It is fetched into the user's cache, once a machine."""
    toolchain.prepare()
    toolchain.load()


def compile_library(path: Path, source: str, *options: str) -> None:
    """A shared object of a C source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [*c_compiler(), "-shared", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{path.name}", *options]
    command += ["-o", str(path), "-x", "c", "-"]
    # libraries stand behind the source that wants them
    command += [option for option in options if option.startswith("-l")]
    subprocess.run(command, input=source, text=True, check=True)


def make_libraries(folder: Path) -> Path:
    """Libraries with the names of ROCm's, whose functions work; and one of the system's, without versions."""
    for name, source in _LIBRARIES.items():
        options = []
        if name in _VERSIONS:
            script = folder / f"{name}.versions"
            folder.mkdir(parents=True, exist_ok=True)
            script.write_text(_VERSIONS[name], encoding="ascii")
            options = [f"-Wl,--version-script={script}"]
        compile_library(folder / name, source, *options)
    return folder


def make_plugin(path: Path, libraries: Path, *options: str) -> Path:
    """A plugin that is linked against the libraries of a folder, and knows them by name only."""
    needed = [f"-L{libraries}", *(f"-l:{name}" for name in (HIP, RCCL, CXX)), "-Wl,--no-as-needed"]
    compile_library(path, _PLUGIN, *options, *needed)
    return path


def make_wheel(folder: Path, plugin: Path) -> Path:
    """The plugin as a wheel of the version of the jax that runs."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"jax_rocm7_pjrt-{jax.__version__}-py3-none-manylinux_2_27_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(plugin, "jax_plugins/xla_rocm7/xla_rocm_plugin.so")
        archive.writestr("jax_plugins/xla_rocm7/__init__.py", "raise AssertionError('imported')")
    return wheel


def kernel_code(lowered: jax.stages.Lowered, kernels: Kernels, folder: Path, name: str) -> list[str]:
    """LLVM's optimised code of the functions that are named after a kernel.

    Args:
        lowered: for a described device.
        kernels: of its target.
        folder: to write all code to; of another program if it is not empty.
        name: of the kernel, as `launch` was given it.
    """
    if not any(folder.iterdir()):
        options: dict[str, str | bool] = {**(kernels.compiler_options or {}), "xla_dump_to": str(folder)}
        lowered.compile(compiler_options=options)
    code = "".join(file.read_text() for file in folder.glob("*ir-with-opt.ll"))
    bodies = re.split(r"^define ", code, flags=re.MULTILINE)[1:]
    return [body for body in bodies if name in body.partition("(")[0]]

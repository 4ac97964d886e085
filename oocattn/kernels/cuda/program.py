"""CUDA C++ that NVRTC compiles on first use and keeps on disk.

NVRTC and `cuda.bindings` come with torch's builds for CUDA 13; no compiler, header or build step is needed. A build lies in
`~/.cache/oocattn` (or where the XDG base directory specification says) under a digest of all that it depends on, with a
checksum of its bytes. Kernels are launched on torch's current stream.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

from oocattn.errors import OocattnError

_DIGEST_BYTES = hashlib.sha256().digest_size


class CompilationError(OocattnError):
    """NVRTC does not compile a program: what it says is the message."""


class Program:
    """One source file of this folder with its macros; for any number of GPUs.

    `variant` follows an architecture's number: "a" for its own instructions. Each block has `shared_bytes` of dynamic shared
    memory.
    """

    def __init__(self, source: str, macros: Mapping[str, int], *, variant: str = "", shared_bytes: int = 0) -> None:
        self._name = source
        self._source = _source(source)
        self._variant = variant
        self._shared_bytes = shared_bytes
        self._macros = tuple(f"--define-macro={name}={value}" for name, value in sorted(macros.items()))
        self._functions: dict[tuple[str, torch.device], Any] = {}
        self._libraries: dict[str, Any] = {}

    def build(self, architecture: str, folder: Path | None = None) -> bytes:
        """Compile for an architecture such as "sm_90", or read a build kept in `folder` (default: the user's cache).

        Needs no GPU. Raises CompilationError. A folder that cannot be written is no error.
        """
        options = self._options(architecture)
        version = "nvrtc {}.{}".format(*checked(nvrtc.nvrtcVersion()))
        sources = self._source + b"".join(_headers().values())
        digest = hashlib.sha256("\0".join((version, *options, "")).encode() + sources).hexdigest()
        folder = folder or _cache_folder()
        if folder is None:
            return self._compile(options)[0]
        path = folder / f"{Path(self._name).stem}-{architecture}-{digest[:32]}.cubin"
        kept = _read_checked(path)
        if kept is None:
            kept, _ = self._compile(options)
            _keep(path, kept)
        return kept

    def report(self, architecture: str) -> str:
        """The compiler's report for an architecture: registers and spills. Needs no GPU."""
        return self._compile((*self._options(architecture), "--ptxas-options=--verbose"))[1]

    def _options(self, architecture: str) -> tuple[str, ...]:
        return ("--std=c++17", f"--gpu-architecture={architecture}", *self._macros)

    def launch(
        self,
        kernel: str,
        device: torch.device,
        blocks: int,
        threads: int,
        arguments: Sequence[Any],
        *,
        early: bool = False,
    ) -> None:
        """Launch a kernel of this program on torch's current stream of `device`.

        `arguments` are of ctypes. An `early` one may begin before the launch ahead has ended, and waits for it by itself.
        Raises CompilationError where the program cannot be compiled for the device.
        """
        with nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device):
            checked(driver.cuCtxSetCurrent(_context(device)))
            function = self._functions.get((kernel, device)) or self._load(kernel, device)
            pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
            stream = torch.cuda.current_stream(device).cuda_stream
            sizes = (blocks, 1, 1, threads, 1, 1, self._shared_bytes)
            if early:
                checked(driver.cuLaunchKernelEx(_config(stream, *sizes), function, ctypes.addressof(pointers), 0))
            else:
                checked(driver.cuLaunchKernel(function, *sizes, stream, ctypes.addressof(pointers), 0))

    def _load(self, kernel: str, device: torch.device) -> Any:
        architecture = "sm_{}{}{}".format(*torch.cuda.get_device_capability(device), self._variant)
        if architecture not in self._libraries:
            library = driver.cuLibraryLoadData(self.build(architecture), [], [], 0, [], [], 0)
            self._libraries[architecture] = checked(library)
        function = checked(driver.cuLibraryGetKernel(self._libraries[architecture], kernel.encode()))
        most_shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        number = checked(driver.cuDeviceGet(device.index))
        checked(driver.cuKernelSetAttribute(most_shared, self._shared_bytes, function, number))
        self._functions[kernel, device] = driver.CUfunction(int(function))
        return self._functions[kernel, device]

    def _compile(self, options: Sequence[str]) -> tuple[bytes, str]:
        """The machine code, and what the compiler said."""
        names, contents = [name.encode() for name in _headers()], list(_headers().values())
        program = checked(nvrtc.nvrtcCreateProgram(self._source, self._name.encode(), len(names), contents, names))
        try:
            (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
            log = b" " * (checked(nvrtc.nvrtcGetProgramLogSize(program)) + 1)  # never the shared bytes of length 1
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            said = log.decode().strip(chr(0)).strip()
            if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise CompilationError(f"{self._name} does not compile ({code.name}): {said}")
            cubin: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
            checked(nvrtc.nvrtcGetCUBIN(program, cubin))
            return cubin, said
        finally:
            nvrtc.nvrtcDestroyProgram(program)


@lru_cache(256)
def _config(stream: int, *sizes: int) -> Any:
    """The launch configuration of a kernel that may begin before the launch ahead has ended."""
    config, attribute, value = driver.CUlaunchConfig(), driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    names = ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ", "sharedMemBytes")
    for name, size in zip(names, sizes, strict=True):
        setattr(config, name, size)
    config.hStream = stream
    value.programmaticStreamSerializationAllowed = 1
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value = value
    config.attrs, config.numAttrs = [attribute], 1
    return config


def _source(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


@cache
def _headers() -> dict[str, bytes]:
    """The headers that the sources of this folder include, by name."""
    names = sorted(file.name for file in files(__package__).iterdir() if file.name.endswith(".cuh"))
    return {name: _source(name) for name in names}


@cache
def _context(device: torch.device) -> Any:
    """The context in which torch works on a GPU."""
    torch.cuda.init()
    return checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(device.index))))


def checked(answer: tuple[Any, ...]) -> Any:
    """The values that a call of cuda.bindings returned. Raises torch.OutOfMemoryError, or RuntimeError for other errors."""
    code, *values = answer
    if code is driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"CUDA: {code.name}")
    if int(code) != 0:
        raise RuntimeError(f"CUDA: {code.name}")
    return values[0] if len(values) == 1 else values


def _cache_folder() -> Path | None:
    """The folder of the user's cache; None for a user without a home."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "oocattn"
    except RuntimeError:
        return None


def _read_checked(path: Path) -> bytes | None:
    """The build that `_keep` wrote; None where it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, kept = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return kept if hashlib.sha256(kept).digest() == digest else None


def _keep(path: Path, content: bytes) -> None:
    """Write a build and its checksum, by renaming: other processes may do the same."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is executed
        temporary.write_bytes(hashlib.sha256(content).digest() + content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
